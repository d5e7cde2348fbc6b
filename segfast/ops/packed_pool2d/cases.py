"""The shapes of packed pooling: odd ones to prove kernels on, and layers of SegNet."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case, Launch, Proof, Tensors, moved, normal
from .._operands import load_kernels
from .functional import packed_max_pool2d, packed_max_unpool2d
from .operators import POOL, UNPOOL, UNPOOL_BACKWARD


class Pool(Case):
    """The largest of each 2x2 of x [n, c, h, w], the last ones of odd sides among them."""

    family, op = "packed_pool2d", "packed_max_pool2d"

    @property
    def pooled(self) -> tuple[int, int]:
        return (self["h"] + 1) // 2, (self["w"] + 1) // 2

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        return {"x": normal(device, dtype, generator)(self["n"], self["c"], self["h"], self["w"])}

    def formula(self, t: Tensors) -> Tensor:
        return F.max_pool2d(t["x"], 2, ceil_mode=True, return_indices=True)[0]

    def ours(self, t: Tensors) -> Tensor:
        return packed_max_pool2d(t["x"], ceil_mode=True)[0]

    @property
    def min_bytes(self) -> float:
        # Values read and written, and 2 bits for each of those that are a quarter.
        pixels = self["n"] * self["c"] * self["h"] * self["w"]
        return pixels * (1.25 * self.torch_dtype.itemsize + 1 / 16)


class Unpool(Pool):
    """Values x of the windows of images [n, c, h, w], each put where the largest pixel of its window was."""

    op = "packed_max_unpool2d"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """With the indices as torch has them, and as we do."""
        image = super().inputs(device, dtype, generator)["x"]
        values, indices = F.max_pool2d(image, 2, ceil_mode=True, return_indices=True)
        return {"x": values, "indices": indices, "places": POOL.reference(image, True)[1]}

    def formula(self, t: Tensors) -> Tensor:
        return F.max_unpool2d(t["x"], t["indices"], [2, 2], output_size=[self["h"], self["w"]])

    def ours(self, t: Tensors) -> Tensor:
        return packed_max_unpool2d(t["x"], t["places"], (self["h"], self["w"]))


class Kernels(Pool):
    """Every kernel on images [n, c, h, w]: whole numbers from -2 to 2, so that windows have equal pixels."""

    op = "kernels"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Images, and a gradient for each of their pixels."""
        draw = normal(device, dtype, generator)
        shape = self["n"], self["c"], self["h"], self["w"]
        return {"x": draw(*shape).round().clamp(-2, 2), "grad": draw(*shape)}

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        t = self.drawn(dtype)
        size = [self["h"], self["w"]]
        wide = t["x"].double()
        values, indices = F.max_pool2d(wide, 2, ceil_mode=True, return_indices=True)
        unpooled = F.max_unpool2d(values, indices, [2, 2], output_size=size)
        grads = t["grad"].double().flatten(2).gather(2, indices.flatten(2)).view(values.shape)
        on_device, (pool, unpool, backward) = moved(t, device), (POOL, UNPOOL, UNPOOL_BACKWARD)
        x, grad = on_device["x"], on_device["grad"]

        def places() -> Tensor:
            return pool(x, True)[1]

        runs = (
            (pool, lambda: pool(x, True)[0], values),
            (unpool, lambda: unpool(pool(x, True)[0], places(), size), unpooled),
            (backward, lambda: backward(grad, places()), grads),
        )
        for operator, run, exact in runs:
            aten = exact.to(dtype)
            yield Proof(operator.name, self.name, run, exact, aten, exact.abs(), depth=1)

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        kernels, batch, channels = load_kernels(), self["n"], self["c"]

        def image(channels: int, *size: int, dtype: torch.dtype = dtype) -> Tensor:
            t = torch.empty(batch, channels, *size, dtype=dtype, device="meta")
            return t.to(memory_format=torch.channels_last)

        x, y = image(channels, self["h"], self["w"]), image(channels, *self.pooled)
        places = image(-(-channels // 4), *self.pooled, dtype=torch.uint8)
        # Of its two stores the pooling's narrower one is a thread's places.
        yield f"{self.name} pool", partial(kernels.packed_max_pool2d, x, y, places), 1
        yield f"{self.name} unpool", partial(kernels.packed_max_unpool2d, y, places, x), 16
        yield f"{self.name} backward", partial(kernels.packed_max_unpool2d_backward, x, places, y), 16


# The paper's images are 360x480.
SMALL = {"n": 1, "h": 45, "w": 60}
CASES: list[Case] = [
    Kernels("5 channels", "", {"n": 2, "c": 5, "h": 7, "w": 4}, uses=("prove",)),
    Kernels("64 channels", "", {"n": 1, "c": 64, "h": 12, "w": 17}, uses=("prove",)),
    Kernels("200 channels", "", {"n": 2, "c": 200, "h": 1, "w": 9}, uses=("prove",)),
    Kernels("segnet_pool1", "SegNet", {"n": 8, "c": 64, "h": 360, "w": 480}, uses=("compile",)),
    Kernels("segnet_pool4", "SegNet", {"n": 8, "c": 512, "h": 45, "w": 60}, uses=("compile",)),
    Kernels("24 channels", "", {"n": 2, "c": 24, "h": 65, "w": 65}, uses=("compile",)),
    *(case
      for name, layer, c, h, w in (("1", "conv1_2", 64, 360, 480), ("4", "conv4_3", 512, 45, 60))
      for case in (
          Pool(f"segnet_pool{name}", f"SegNet, after {layer}", {"n": 8, "c": c, "h": h, "w": w}, SMALL),
          Unpool(f"segnet_unpool{name}", f"SegNet, before the mirror of {layer}",
                 {"n": 8, "c": c, "h": h, "w": w}, SMALL),
      )),
]  # fmt: skip
