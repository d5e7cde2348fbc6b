"""A trial of a whole model: the plain twin, its peers, and segfast's model with the same weights."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import segfast
from benchmarks import plain_resnet
from benchmarks.cases import Case
from benchmarks.environment import dry_run
from benchmarks.fused_models import fused_with_cudnn
from benchmarks.peers import Peer, compile_note
from benchmarks.plain_models import DEEPLABV3PLUS, plain_model
from benchmarks.timing import Candidate, Skipped
from segfast._optimize.measure import thoroughly
from segfast.ops._gpu_measure import without_search

TOLERANCE = 5e-2  # of logits after tens of layers, and of a training step's loss, in 16 bits
# Where a rounding chooses another pixel of a window, its value comes to another place.
UNSTEADY = {"segnet_vgg16": 0.3}
OPTIMIZE_SECONDS = 20.0  # for what no earlier step has chosen


class ModelTrial:
    """A network with random weights and images; `forward` in the case's dtype, `train` under autocast to it.

    Raises LookupError where this machine has no plain twin of the network.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        torch.manual_seed(seed)
        found = plain_model(case["model"], small=case.size != "full")
        if isinstance(found, str):
            raise LookupError(found)
        network, channels = found
        self.network = network.to(device, memory_format=torch.channels_last)
        self.tolerance = UNSTEADY.get(case["model"], TOLERANCE)
        self.training = case.direction == "train"
        # Batch norm over one 1x1 map has no variance: a training step takes at least two images.
        batch = max(2, case["n"]) if self.training else case["n"]
        images = torch.randn(batch, channels, case["h"], case["w"], device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.zeros(0)
        if self.training:
            with torch.no_grad():
                logits = self.network.eval()(self.images[:1])
            shape = (batch, *logits.shape[2:])
            self.labels = torch.randint(logits.shape[1], shape, device=device)
        self.expected = self._reference()
        self.sample: Callable[[Any], Any] = (
            (lambda output: output) if self.training else (lambda output: output[:1])
        )

    def _reference(self) -> torch.Tensor:
        with without_search():
            if self.training:
                return self._step(_trained(self.network), self.images, autocast=False)()
            with torch.no_grad():
                return self.network.eval()(self.images[:1])

    def reference(self) -> torch.Tensor:
        """Logits of the first image, or the loss, in fp32."""
        return self.expected

    def _step(self, network: nn.Module, images: torch.Tensor, autocast: bool) -> Callable[[], torch.Tensor]:
        parameters = [p for p in network.parameters() if p.requires_grad]

        def step() -> torch.Tensor:
            with self._autocast(autocast):
                loss = F.cross_entropy(network(images).float(), self.labels)
            torch.autograd.grad(loss, parameters, allow_unused=True)
            return loss.detach()

        return step

    def bind(self, network: nn.Module, images: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        """A call of the network in the case's direction, by default on the trial's images."""
        network = self._in_mode(network)
        images = self._given() if images is None else images
        if self.training:
            return self._step(network, images, autocast=True)
        return lambda: _run(network, images)

    def _in_mode(self, network: nn.Module) -> nn.Module:
        return _trained(network) if self.training else network.eval().to(self.case.torch_dtype)

    def _given(self) -> torch.Tensor:
        """The images in the dtype in which a network gets them."""
        return self.images if self.training else self.images.to(self.case.torch_dtype)

    def _autocast(self, enabled: bool) -> torch.autocast:
        sixteen = self.case.torch_dtype != torch.float32
        return torch.autocast(self.device.type, self.case.torch_dtype, enabled=enabled and sixteen)

    def peers(self, compiled: bool = False) -> Iterator[Peer]:
        """The plain twin: eager in both layouts, on cuDNN's fused calls, `compiled` by torch.compile."""
        yield self.eager()
        plain = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)
        yield Candidate("eager_nchw", self.bind(plain, self._given().contiguous()), tolerance=self.tolerance)
        if self.device.type == "cuda" and not self.training:
            yield self.fused()
        if compiled:
            yield self.compiled("default")

    def eager(self) -> Candidate:
        """The plain twin, channels_last."""
        return Candidate("eager_nhwc", self.bind(self.network), tolerance=self.tolerance)

    def compiled(self, mode: str) -> Candidate:
        """The same by torch.compile, which is part of its first call."""
        network = torch.compile(self._in_mode(self.network), mode=mode, dynamic=False)
        run = (
            self._step(network, self.images, True) if self.training else partial(_run, network, self._given())
        )
        name = "compile" if mode == "default" else "compile_max_autotune"
        return Candidate(name, run, note=compile_note(mode), tolerance=self.tolerance)

    def fused(self) -> Peer:
        """The twin with every sequence that cuDNN has a call for as that call; in inference."""
        images = self.images.to(self.case.torch_dtype)
        try:
            network, count = fused_with_cudnn(self.network.eval().to(images.dtype), images)
        except Exception as error:
            return Skipped("cudnn_fused", f"{type(error).__name__}: {error}".splitlines()[0])
        return Candidate(
            "cudnn_fused",
            lambda: _run(network, images),
            note=f"{count} fused calls",
            tolerance=self.tolerance,
        )

    def ours(self, compiled: bool = False) -> Iterator[Peer]:
        """segfast's model of that name with the twin's weights, on a GPU optimized, in its first call."""
        if _segfast_model(self.case, self.network) is None:
            yield Skipped("segfast", f"segfast has no {self.case['model']} yet")
            return
        built: list[Callable[[], torch.Tensor]] = []

        def run() -> torch.Tensor:
            with segfast.backend("auto"):
                if not built:
                    network = self.optimized(OPTIMIZE_SECONDS) if self.chooses else self.twin()
                    candidate.note = str(segfast.report(network).gain or "")
                    built.append(self.bind(network))
                return built[0]()

        candidate = Candidate("segfast", run, ours=True, tolerance=self.tolerance)
        yield candidate

    @property
    def chooses(self) -> bool:
        """True if ours is optimized: a CPU's figures are those of `benchmarks.networks`."""
        return self.device.type == "cuda" or dry_run()

    def twin(self) -> nn.Module:
        """segfast's model with the plain twin's weights, in the case's mode."""
        network = _segfast_model(self.case, self.network)
        assert network is not None
        return self._in_mode(network.to(self.device, memory_format=torch.channels_last))

    def optimized(self, budget_s: float, thorough: bool = False) -> nn.Module:
        """The same after `segfast.optimize`; `thorough`, as `segfast tune` does it, with all tiles."""
        with self._autocast(self.training), thoroughly() if thorough else contextlib.nullcontext():
            return segfast.optimize(
                self.twin(), self._given(), inplace=True, budget=budget_s, progress=False, train=self.training
            )


@torch.no_grad()
def _run(network: Callable[..., torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    return network(images)


def _trained(network: nn.Module) -> nn.Module:
    """The network in training mode but for dropout, with which the loss would be another in every call."""
    network.train()
    for module in network.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.eval()
    return network.float()


class _Out(nn.Module):
    """A network that returns a dictionary, by its main output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)["out"]


def _segfast_model(case: Case, plain: nn.Module) -> nn.Module | None:
    from segfast.models import UNet, create, fcn8s

    name = case["model"]
    if name in DEEPLABV3PLUS:
        network = create(f"deeplabv3plus_{DEEPLABV3PLUS[name]}", separable="xception65" in name)
        network.load_state_dict(plain.state_dict())
        return network
    if name in plain_resnet.NAMES:
        network = create(name)
        network.load_state_dict(plain.state_dict())
        return _Out(network)
    weights = list(plain.parameters())
    width = weights[0].shape[0]
    if name == "unet":
        network = UNet(1, 2, width=width, padded=False)
    elif name == "fcn8s_vgg16":
        network = fcn8s(width=width)
    elif name == "segnet_vgg16":
        network = create(name, width_mult=width / 64)
    else:
        return None
    # Both register their layers in one order, so the parameters correspond one to one.
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), weights, strict=True):
            ours.copy_(theirs)
    return network
