"""The shapes of segmentation heads: odd ones to prove kernels on, and heads of networks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case, Launch, Proof, Tensors, changed, moved, normal
from .._operands import load_kernels
from . import formulas
from .functional import upsample_argmax, upsample_cross_entropy, upsample_dice
from .geometry import Resampling, upsample, upsample_adjoint
from .operators import ARGMAX, CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, DICE_SUMS, DICE_SUMS_BACKWARD

IGNORED = 255


class CrossEntropy(Case):
    """A loss of logits [n, classes, h, w] that are enlarged `scale` times, bilinearly."""

    family, op = "segmentation_head", "upsample_cross_entropy"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        n, classes, size = self["n"], self["classes"], (self["h"], self["w"])
        shape = n, *(self["scale"] * side for side in size)
        labels = torch.randint(classes, shape, device=device, generator=generator)
        return {"x": normal(device, dtype, generator)(n, classes, *size), "labels": labels}

    def upsampled(self, t: Tensors) -> Tensor:
        return F.interpolate(t["x"], scale_factor=self["scale"], mode="bilinear", align_corners=False)

    def formula(self, t: Tensors) -> Tensor:
        return F.cross_entropy(self.upsampled(t), t["labels"])

    def ours(self, t: Tensors) -> Tensor:
        return upsample_cross_entropy(t["x"], t["labels"], scale_factor=self["scale"])

    @property
    def min_bytes(self) -> float:
        # Logits and labels, which an argmax writes; a gradient reads both again and writes the logits' size.
        pixels = self["h"] * self["w"]
        logits = self["classes"] * pixels * self.torch_dtype.itemsize
        labels = pixels * self["scale"] ** 2 * 8.0
        passes = {"backward": 2 * logits + labels, "train": 3 * logits + 2 * labels}
        return self["n"] * passes.get(self.direction, logits + labels)

    @property
    def exponentials(self) -> float:
        passes = {"train": 2, "backward": 1}.get(self.direction, 1)
        return passes * self["n"] * self["classes"] * self["h"] * self["w"] * self["scale"] ** 2


class Dice(CrossEntropy):
    op = "upsample_dice"

    def formula(self, t: Tensors) -> Tensor:
        p = torch.softmax(self.upsampled(t), 1)
        hot = F.one_hot(t["labels"], self["classes"]).movedim(-1, 1).to(p.dtype)
        hits, sizes, pixels = (part.sum((0, 2, 3)) for part in (p * hot, p + hot, hot))
        return ((1 - 2 * hits / sizes.clamp_min(1e-7)) * (pixels > 0)).mean()

    def ours(self, t: Tensors) -> Tensor:
        return upsample_dice(t["x"], t["labels"], scale_factor=self["scale"])


class Argmax(CrossEntropy):
    op = "upsample_argmax"
    exponentials = 0.0

    def formula(self, t: Tensors) -> Tensor:
        return self.upsampled(t).argmax(1)

    def ours(self, t: Tensors) -> Tensor:
        return upsample_argmax(t["x"], scale_factor=self["scale"])  # type: ignore[return-value]


class HeadKernels(Case):
    """Every kernel on logits [n, classes, h, w] and a `resampling`; a `weighted` loss with a `smoothing`."""

    family, op = "segmentation_head", "kernels"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Logits, labels of which some are ignored, and what gradients of both losses are given."""
        n, classes, size = self["n"], self["classes"], self["resampling"].size
        logits = (3 * torch.randn(n, classes, self["h"], self["w"], generator=generator)).to(dtype)
        labels = torch.randint(classes, (n, *size), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORED
        t = {"x": logits, "labels": labels}
        if self["weighted"]:
            t["weight"] = torch.rand(classes, generator=generator) + 0.5
        t["grad"] = torch.randn(labels.shape, generator=generator)
        t["dice_grad"] = torch.randn(3, classes, generator=generator)
        return moved(t, device)

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        t = self.drawn(dtype)
        wide, on_device = changed(t, Tensor.double), moved(t, device)
        z = upsample(wide["x"], *self["resampling"])
        given = _Given(wide, on_device, z, z.abs().amax(1))
        yield from self._cross_entropy(given)
        yield from self._argmax(given)
        yield from self._dice(given)

    def _cross_entropy(self, given: "_Given") -> Iterator[Proof]:
        resampling, (t, x, z, scale) = self["resampling"], given
        options = (*resampling, IGNORED, self["smoothing"])
        per_pixel = (*options, True)
        reference, lse = formulas.cross_entropy(t["x"], t["labels"], t.get("weight"), *per_pixel)
        # The logits as the separate functions have them, and the resampling that changes nothing of them.
        rounded = upsample(x["x"], *resampling).float()
        same = (resampling.size, "nearest", False, None, *per_pixel[4:])
        aten = formulas.cross_entropy(rounded, x["labels"], x.get("weight"), *same)[0]
        run = partial(CROSS_ENTROPY, x["x"], x["labels"], x.get("weight"), *per_pixel)
        yield self._proof("upsample_softmax_forward", lambda: run()[0], reference, aten, 2 * scale)

        def gradient(formula: Callable[..., Tensor], t: Tensors, lse: Tensor) -> Tensor:
            return formula(t["grad"], t["x"], t["labels"], t.get("weight"), lse, *options)

        reference = gradient(formulas.cross_entropy_gradient, t, lse)
        lse = lse.float().to(x["x"].device)
        aten = gradient(formulas.cross_entropy_gradient, x, lse)
        size = (torch.softmax(z, 1) + 0.1) * (t["grad"].abs() * (1 + scale))[:, None]
        run = partial(gradient, CROSS_ENTROPY_BACKWARD, x, lse)
        yield self._gradient("upsample_grad_logits", run, reference, aten, size)

    def _argmax(self, given: "_Given") -> Iterator[Proof]:
        _, x, z, scale = given
        p = torch.softmax(z, 1)
        aten, best = torch.softmax(upsample(x["x"], *self["resampling"]).float(), 1), p.amax(1)
        run = partial(ARGMAX, x["x"], *self["resampling"], True)

        def chosen() -> Tensor:
            # Where two classes are as good as equal either label is right: judged by its probability.
            label = run()[0].cpu()[:, None]
            known = (label >= 0) & (label < z.shape[1])
            return torch.where(known, p.gather(1, label.where(known, 0)), torch.nan)[:, 0].float()

        labels = self._proof("upsample_argmax", chosen, best, best.float(), scale)
        yield labels._replace(case=f"{self.name}, labels")
        yield self._proof("upsample_argmax", lambda: run()[1], best, aten.amax(1), scale)

    def _dice(self, given: "_Given") -> Iterator[Proof]:
        options, (t, x, z, scale) = (*self["resampling"], IGNORED), given
        reference = formulas.dice_sums_of(z, t["labels"], IGNORED)
        aten = formulas.dice_sums_of(upsample(x["x"], *self["resampling"]).float(), x["labels"], IGNORED)
        sums, size = partial(DICE_SUMS, x["x"], x["labels"], *options), reference * (1 + scale.max())
        yield self._proof("upsample_dice_sums", lambda: sums()[0], reference, aten, size)

        def gradient(formula: Callable[..., Tensor], t: Tensors, lse: Tensor) -> Tensor:
            return formula(t["dice_grad"], t["x"], t["labels"], lse, *options)

        lse = torch.logsumexp(z, 1)
        reference = gradient(formulas.dice_gradient, t, lse)
        lse = lse.float().to(x["x"].device)
        aten = gradient(formulas.dice_gradient, x, lse)
        size = torch.softmax(z, 1) * (1 + scale)[:, None] * 4 * t["dice_grad"].abs().max().item()
        run = partial(gradient, DICE_SUMS_BACKWARD, x, lse)
        yield self._gradient("softmax_expectation", run, reference, aten, size)

    def _proof(
        self, operation: str, run: Callable[[], Tensor], reference: Tensor, aten: Tensor, size: Tensor
    ) -> Proof:
        return Proof(operation, self.name, run, reference, aten, size, self["classes"])

    def _gradient(
        self, operation: str, run: Callable[[], Tensor], reference: Tensor, aten: Tensor, size: Tensor
    ) -> Proof:
        """Proof of the logits' gradient: each element sums over many pixels, whose terms have this `size`."""
        resampling, low = self["resampling"], (self["h"], self["w"])
        rows, columns = (high // few + 1 for high, few in zip(resampling.size, low, strict=True))
        size = upsample_adjoint(size, reference.shape, *resampling[1:])
        return Proof(operation, self.name, run, reference, aten, size, 4 * rows * columns)

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        """A thread stores single numbers, its neighbors those beside: whole cache lines of a warp."""
        kernels, n, classes = load_kernels(), self["n"], self["classes"]
        size, mode, align_corners, _ = self["resampling"]

        def make(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="meta")

        x, t = make(n, classes, self["h"], self["w"], dtype=dtype), make(n, *size, dtype=torch.int64)
        lse, losses, mean = (make(n, *size) for _ in range(3))
        weight, smoothing = make(classes) if self["weighted"] else None, self["smoothing"]
        per_class, how, labels = make(3, classes), (mode, align_corners, None), make(n, *size, dtype=t.dtype)
        calls: dict[str, tuple[Callable[..., Any], tuple, int]] = {
            "loss": (kernels.upsample_softmax_forward,
                     (x, t, weight, None, lse, *how, IGNORED, smoothing), 4),
            "losses": (kernels.upsample_softmax_forward,
                       (x, t, weight, losses, lse, *how, IGNORED, smoothing), 4),
            "gradient": (kernels.upsample_grad_logits,
                         (make(), x, t, weight, lse, None, x, *how, IGNORED, smoothing), dtype.itemsize),
            "argmax": (kernels.upsample_argmax, (x, labels, None, *how), 8),
            "confidence": (kernels.upsample_argmax, (x, labels, mean, *how), 4),
            "dice": (kernels.upsample_dice_sums, (x, t, lse, *how, IGNORED), 4),
            "dice mean": (kernels.softmax_expectation, (x, t, lse, per_class, mean, *how), 4),
            "dice gradient": (kernels.upsample_grad_logits,
                              (per_class, x, t, None, lse, mean, x, *how, IGNORED, 0.0), dtype.itemsize),
        }  # fmt: skip
        for name, (launcher, args, least) in calls.items():
            yield f"{self.name} {name}", partial(launcher, *args), least


class _Given(NamedTuple):
    """A case's tensors, wide and on the device; the wide logits upsampled, and the largest of each pixel."""

    wide: Tensors
    on_device: Tensors
    z: Tensor
    scale: Tensor


def _kernels(name, use, n, classes, h, w, resampling, weighted=False, smoothing=0.0, layer="") -> HeadKernels:
    params = {"n": n, "classes": classes, "h": h, "w": w, "resampling": resampling, "weighted": weighted}
    return HeadKernels(name, layer, {**params, "smoothing": smoothing}, uses=(use,))


def _proven(name, n, classes, h, w, resampling, weighted=False, smoothing=0.0) -> HeadKernels:
    """A case to prove. All: odd sizes, classes that fill no block, cells of one output and of many."""
    return _kernels(name, "prove", n, classes, h, w, resampling, weighted, smoothing)


def _compiled(name, n, classes, h, w, size, mode="bilinear", corners=False, weighted=False) -> HeadKernels:
    """A case to compile, with weighted classes and a smoothed loss or with neither."""
    resampling = Resampling(size, mode, corners, None)
    return _kernels(name, "compile", n, classes, h, w, resampling, weighted, 0.1 * weighted)


def _head(name, layer, n, classes, h, w, scale, *, small, quick=False, compiled=None) -> Iterator[Case]:
    """The loss forward and in training, the dice loss in training, and the labels."""
    params = {"n": n, "classes": classes, "h": h, "w": w, "scale": scale}
    small = {"n": 1, "h": small[0], "w": small[1]}
    for kind, direction, ending in (
        (CrossEntropy, "train", "loss"),
        (CrossEntropy, "forward", "loss_forward"),
        (Dice, "train", "dice"),
        (Argmax, "forward", "argmax"),
    ):
        uses = ("benchmark", "quick") if quick and ending == "loss" else ("benchmark",)
        yield kind(f"{name}_{ending}", layer, params, small, uses=uses, direction=direction)
    if compiled is not None:
        size = (scale * h, scale * w)
        yield _compiled(name, n, classes, h, w, size, weighted=compiled == "weighted")


CASES = [
    _proven("x4 150 classes", 2, 150, 9, 13, Resampling((36, 52), "bilinear", False, (4.0, 4.0))),
    _proven("x8 19 classes weighted", 2, 19, 7, 5, Resampling((56, 40), "bilinear", False, None), True, 0.1),
    _proven("corners 21 classes", 1, 21, 9, 17, Resampling((65, 129), "bilinear", True, None), True),
    _proven("x2.3 5 classes", 3, 5, 11, 8, Resampling((25, 18), "bilinear", False, (2.3, 2.3)), False, 0.3),
    _proven("smaller", 1, 33, 19, 23, Resampling((7, 9), "bilinear", False, None)),
    _proven("nearest", 2, 12, 6, 7, Resampling((13, 28), "nearest", False, None), True, 0.2),
    *_head("ade20k_upsample", "ADE20K head, 512 pixels", 16, 150, 128, 128, 4,
           small=(32, 32), quick=True, compiled="plain"),
    *_head("ade20k_upsample_os32", "ADE20K head, 512 pixels, OS32", 4, 150, 16, 16, 32,
           small=(3, 3), compiled="plain"),
    *_head("cityscapes_upsample_n1", "Cityscapes head, 1024x2048, OS8", 1, 19, 128, 256, 8, small=(16, 32)),
    *_head("cityscapes_upsample_n8", "Cityscapes head, 1024x2048, OS8", 8, 19, 128, 256, 8,
           small=(8, 16), compiled="weighted"),
    *_head("voc_upsample_n1", "PASCAL VOC head, 512 pixels, OS8", 1, 21, 64, 64, 8, small=(16, 16)),
    *_head("voc_upsample_n8", "PASCAL VOC head, 512 pixels, OS8", 8, 21, 64, 64, 8, small=(12, 12)),
    _compiled("voc corners", 8, 21, 65, 65, (513, 513), corners=True),
    _compiled("voc x16", 8, 21, 33, 33, (513, 513)),
    _compiled("binary x2", 8, 2, 128, 128, (256, 256)),
    _compiled("ade20k nearest", 16, 150, 128, 128, (512, 512), "nearest", weighted=True),
    _compiled("past_int32", 64, 1024, 256, 256, (512, 512), weighted=True),
]  # fmt: skip
