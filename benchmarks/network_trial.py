"""A trial of a whole network: eager in both layouts, compiled with freezing, and by `segfast.optimize`."""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import segfast
from benchmarks.networks import NETWORKS, SIDES, build_network, draw_images
from benchmarks.peers import Peer
from benchmarks.timing import Candidate, Skipped, relative_error
from segfast._optimize.compiled import segfast_backend
from segfast.models._base import main_scores
from segfast.ops._case import Case
from segfast.ops._gpu_measure import without_search

# Of the largest error over the largest score. A GPU's convolutions may round fp32 to tf32.
TOLERANCES = {"cpu": 1e-4, "cuda": 2e-2}
BF16_TOLERANCE = 0.15  # after up to a hundred layers
# Of the norm of all errors over that of all scores, where some values are at other places. With random
# weights SegNet's two eager layouts differ by 3e-3 in fp32, and bf16 from these by 0.2.
UNSTEADY_TOLERANCES = {"cpu": 1e-2, "cuda": 0.1}
UNSTEADY_BF16_TOLERANCE = 0.3
BF16_CANDIDATES = ("eager_bf16", "segfast_bf16")
COMPILE_OPTION = "SEGFAST_BENCH_COMPILE"


class NetworkTrial:
    """A network with random weights on random images that are contiguous, as the caller has them.

    What takes a network time before it is fast (compiling, optimizing) is part of a candidate's first call,
    and none of the timed ones. Raises LookupError for a network whose package is not installed.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self._compiles = False
        self.network = build_network(case["model"], seed).to(device)
        self.images = draw_images(case["n"], case["h"], seed + 1).to(device)
        with without_search(), torch.no_grad():
            self.expected = main_scores(self.network(self.images))
        largest = float(self.expected.abs().max())
        if not 1e-3 < largest < 1e6:
            raise ValueError(f"the largest score of {case['model']} is {largest}: of no use as a reference")
        self.sample: Callable[[Any], Any] = lambda output: output
        self.steady = NETWORKS[case["model"]].steady
        self.error = largest_error if self.steady else relative_error

    def reference(self) -> torch.Tensor:
        """The scores in fp32, of the network as it was built."""
        return self.expected

    def peers(self, compiled: bool = False) -> Iterator[Peer]:
        """Eager in both layouts, `compiled` with freezing, and eager bf16 where the hardware has it.

        All on ATen: what `optimize` chooses for the calls of segfast's own networks must not reach them.
        """
        yield self._candidate("eager_nchw", lambda: self.network, self.images)
        yield self._candidate("eager_nhwc", lambda: _channels_last(self.network), _channels_last(self.images))
        if compiled:
            yield self._candidate("compile_freezing", self._compiled, self.images)
        reason = no_bf16(self.device)
        if reason:
            yield Skipped("eager_bf16", reason)
            return
        images = _channels_last(self.images).to(torch.bfloat16)
        yield self._candidate(
            "eager_bf16", lambda: _channels_last(self.network).to(torch.bfloat16), images, bf16=True
        )

    def ours(self, compiled: bool = False) -> Iterator[Peer]:
        """The network after `segfast.optimize`, in fp32 and, where there is bf16, in bf16.

        And `compiled` by the backend of that name, which runs what `optimize` has found before.
        """
        yield self._candidate(
            "segfast", lambda: segfast.optimize(self.network, self.images), self.images, ours=True
        )
        if compiled:
            yield self._candidate("segfast_compile", self._compiled_by_ours, self.images, ours=True)
        reason = no_bf16(self.device)
        if reason:
            yield Skipped("segfast_bf16", reason)
            return
        yield self._candidate(
            "segfast_bf16",
            lambda: segfast.optimize(self.network, self.images, dtype=torch.bfloat16),
            self.images,
            ours=True,
            bf16=True,
        )

    def _candidate(
        self,
        name: str,
        build: Callable[[], nn.Module | Callable[..., Any]],
        images: torch.Tensor,
        *,
        ours: bool = False,
        bf16: bool = False,
    ) -> Candidate:
        built: list[Callable[..., Any]] = []

        def run() -> torch.Tensor:
            with segfast.backend("auto" if ours else "aten"):
                if not built:
                    built.append(build())
                    candidate.note = _gain(built[0]) if ours else ""
                with torch.no_grad():
                    return main_scores(built[0](images))

        if self.steady:
            tolerance = BF16_TOLERANCE if bf16 else TOLERANCES[self.device.type]
        else:
            tolerance = UNSTEADY_BF16_TOLERANCE if bf16 else UNSTEADY_TOLERANCES[self.device.type]
        candidate = Candidate(name, run, ours, tolerance=tolerance, dtype="bfloat16" if bf16 else "")
        return candidate

    def _compiled(self) -> Callable[..., Any]:
        """A copy, compiled with freezing, which holds for its first call alone."""
        from torch._inductor import config

        with config.patch(freezing=True):
            return self._by_backend("inductor")

    def _compiled_by_ours(self) -> Callable[..., Any]:
        return self._by_backend(segfast_backend)

    def _by_backend(self, backend: Any) -> Callable[..., Any]:
        """A copy, compiled in its first call; nothing is taken from a cache."""
        from torch._inductor.utils import fresh_cache

        if not self._compiles:
            # All networks of a package share one `forward`, which is compiled for only so many of them.
            torch.compiler.reset()
            self._compiles = True
        network = torch.compile(copy.deepcopy(self.network), backend=backend, dynamic=False)
        with fresh_cache(), torch.no_grad():
            network(self.images)
        return network


def _gain(network: nn.Module) -> str:
    """The sentence in which `optimize` says what it gained; empty where it measured nothing."""
    gain = segfast.report(network).gain
    return "" if gain is None else str(gain)


def compile_wanted(case: Case) -> bool:
    """True if torch.compile is measured: it takes a minute a network, so at the smaller size if not told."""
    option = os.environ.get(COMPILE_OPTION, "")
    return option == "1" if option else case["h"] == SIDES[0]


def no_bf16(device: torch.device) -> str:
    """Why bf16 is not measured on `device`; empty where its matrix products are the hardware's."""
    if device.type == "cuda":
        return "" if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU has no bf16"
    known = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "" if known else "this CPU has neither AMX nor AVX512-BF16"


def largest_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error over the largest value; infinite on NaN or another shape."""
    if output.shape != reference.shape:
        return float("inf")
    error = (output.to(reference.dtype) - reference).abs().max() / reference.abs().max()
    return float(torch.nan_to_num(error, nan=float("inf")))


def _channels_last(value: Any) -> Any:
    """A copy of a network or of images in that layout."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(memory_format=torch.channels_last)
    return value.contiguous(memory_format=torch.channels_last)
