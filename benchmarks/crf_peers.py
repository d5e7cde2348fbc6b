"""The dense CRF's peers, and segfast's own ways: pydensecrf on one core and on all, KeOps, plain PyTorch."""

import functools
import importlib.util
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch

import segfast
from benchmarks.crf_cases import PHOTOS
from benchmarks.environment import dry_run
from benchmarks.timing import Candidate, Skipped
from benchmarks.trial import Formula, Trial
from segfast.ops._case import Case, Tensors

Peer = Candidate | Skipped
MOST_EXPONENTIALS = 2e11  # of a timed peer that takes every pair: more would take it seconds a call
# Relative error in norm. The lattice is an approximation, shown with its error; the exact filter leaves out
# what its tolerance says.
LATTICE, EXACT = 0.5, 1e-2
TOLERANCE = 1e-2  # mean_field's default


def peers(trial: Trial) -> Iterator[Peer]:
    case = trial.case
    if case.exponentials > MOST_EXPONENTIALS:
        yield Skipped("pytorch_exact", _too_many(case))
    else:
        yield Candidate("pytorch_exact", trial.bind(trial.formula), note="all pairs, fp32")
    if trial.device.type == "cuda":
        lattice = trial.bind(ours_by(case, "lattice"))
        yield Candidate("pytorch_lattice", _on("aten", lattice), note="torch operations", tolerance=LATTICE)
    yield from _keops(trial)
    yield from _pydensecrf(trial)


def _too_many(case: Case) -> str:
    return f"all pairs are {case.exponentials:.1e} exponentials: it would take too long"


def ours(trial: Trial) -> Iterator[Peer]:
    """Both methods, and the one that is chosen."""
    case = trial.case
    for method, tolerance in (("lattice", LATTICE), ("exact", EXACT), ("auto", LATTICE)):
        name = "segfast" if method == "auto" else f"segfast_{method}"
        run = trial.bind(ours_by(case, method))
        yield Candidate(name, run, ours=True, note=f"image {case['image']}", tolerance=tolerance)


def ours_by(case: Case, method: str) -> Formula:
    """segfast's function for the case, by that method."""
    if case.op == "gaussian_filter":
        options = {"method": method, "normalization": "symmetric"}
        return lambda t: segfast.functional.gaussian_filter(t["values"], t["features"], **options)

    def function(t: Tensors) -> torch.Tensor:
        return segfast.functional.mean_field(
            t["unary"],
            t["image"],
            iterations=case["iterations"],
            theta_alpha=case["alpha"],
            theta_beta=case["beta"],
            theta_gamma=case["gamma"],
            bilateral_weight=case["bilateral_weight"],
            spatial_weight=case["gaussian_weight"],
            method=method,
        )

    return function


def _on(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with segfast.backend(backend):
            return run()

    return call


def _keops(trial: Trial) -> Iterator[Peer]:
    case, missing = trial.case, None
    if importlib.util.find_spec("pykeops") is None:
        missing = "pykeops is not installed"
    elif dry_run():
        missing = "it compiles for minutes: not in a dry run"
    elif case["n"] > 1:
        missing = "one image after the other: see the row of one"
    everything, blocks = missing, missing
    if missing is None and case.exponentials > MOST_EXPONENTIALS:
        everything = _too_many(case)
    if missing is None and trial.device.type != "cuda":
        blocks = "the pairs of tiles are those that our kernels find on a GPU"
    keops = functools.partial(case.formula, make_filter=_keops_filter)
    if everything is not None:
        yield Skipped("keops", everything)
    else:
        yield Candidate("keops", trial.bind(keops), note="all pairs, fp32")
    if blocks is not None:
        yield Skipped("keops_blocks", blocks)
    else:
        run = trial.bind(functools.partial(case.formula, make_filter=_keops_blocks))
        yield Candidate("keops_blocks", run, note="segfast's own pairs of tiles, fp32", tolerance=EXACT)


def _keops_filter(points: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    kernel = _keops_kernel(points.contiguous())
    return lambda values: kernel @ values.contiguous()


def _keops_kernel(points: torch.Tensor) -> Any:
    import pykeops
    from pykeops.torch import LazyTensor

    if points.is_cuda and not pykeops.config.gpu_available:
        raise RuntimeError("pykeops found no CUDA to compile with")
    rows, columns = LazyTensor(points[:, None]), LazyTensor(points[None])
    return (-((rows - columns) ** 2).sum(-1) / 2).exp()


def _keops_blocks(points: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """KeOps on the pairs of tiles that our exact filter computes, in its order of the points."""
    from segfast.kernels import build_exact

    pairs = build_exact(points[None].contiguous(), TOLERANCE)
    order, rows = pairs.order[0].long(), pairs.rows[0].long()
    kernel = _keops_kernel(points[order].contiguous())
    # The last three are for sums over the rows, which nobody asks for.
    kernel.ranges = block_ranges(pairs) * 2
    return lambda values: (kernel @ values[order].contiguous())[rows]


def block_ranges(pairs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image's lists as KeOps takes them, int32: row tiles, the end of each one's runs, runs of columns.

    Neighboring column tiles are one run: a list of tiles each for itself would be slower.
    """
    row_tiles, column_tiles = pairs.lists.shape
    height, width = pairs.padded // row_tiles, pairs.padded // column_tiles
    row, place = (torch.arange(column_tiles, device=pairs.lists.device) < pairs.counts[:, None]).nonzero().T
    # A column before the first and one after the last, in which no run is.
    on = torch.zeros((row_tiles, column_tiles + 2), dtype=torch.bool, device=pairs.lists.device)
    on[row, 1 + pairs.lists[row, place].long()] = True
    begins, ends = on[:, 1:] & ~on[:, :-1], on[:, :-1] & ~on[:, 1:]
    runs = width * torch.stack([begins.nonzero()[:, 1], ends.nonzero()[:, 1]], 1)
    starts = height * torch.arange(row_tiles, device=runs.device)
    tiles = torch.stack([starts, starts + height], 1)
    slices = begins.sum(1).cumsum(0)
    return tiles.clamp_(max=pairs.points).int(), slices.int(), runs.clamp_(max=pairs.points).int()


def _pydensecrf(trial: Trial) -> Iterator[Peer]:
    case = trial.case
    if case.op != "dense_crf":
        missing = "pydensecrf has no filter to be called"
    elif importlib.util.find_spec("pydensecrf") is None:
        missing = "pydensecrf is not installed (pydensecrf2 on PyPI)"
    elif case["labels"] != 21 or case["image"] != PHOTOS[0]:
        missing = "seconds a call: timed on one photograph with 21 labels"
    else:
        yield from _timed_pydensecrf(trial)
        return
    for name in ("pydensecrf", "pydensecrf_all_cores"):
        yield Skipped(name, missing)


def _timed_pydensecrf(trial: Trial) -> Iterator[Peer]:
    images, cores = trial.case["n"], core_count()
    if images == 1:
        note = "permutohedral lattice, one CPU core"
        yield Candidate("pydensecrf", lambda: _one_by_one(trial), note=note, tolerance=LATTICE)
        yield Skipped("pydensecrf_all_cores", "one image")
    else:
        note = f"{images} images in {cores} processes, one CPU core each"
        yield Skipped("pydensecrf", "see all cores")
        yield Candidate("pydensecrf_all_cores", _in_processes(trial, cores), note=note, tolerance=LATTICE)


def core_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _arrays(trial: Trial) -> dict[str, numpy.ndarray]:
    return {name: value.cpu().contiguous().numpy() for name, value in trial.tensors.items()}


def _one_by_one(trial: Trial) -> torch.Tensor:
    """Set-up and iterations, from and to the trial's device: what a user waits for."""
    arrays = _arrays(trial)
    images = map(functools.partial(pydensecrf, trial.case.params), arrays["unary"], arrays["image"])
    return torch.from_numpy(numpy.stack(list(images))).to(trial.device)


@functools.cache
def _processes(cores: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))


def _in_processes(trial: Trial, cores: int) -> Callable[[], torch.Tensor]:
    """The same of a batch, an image at a time in as many processes as there are cores.

    Each reads its images and writes its results where all see them, as if it had loaded them by itself:
    nothing is sent through one process.
    """
    params, count = dict(trial.case.params), trial.case["n"]

    @functools.cache
    def folder() -> tempfile.TemporaryDirectory:
        made, arrays = tempfile.TemporaryDirectory(), _arrays(trial)
        for name, values in {**arrays, "q": numpy.zeros_like(arrays["unary"])}.items():
            numpy.save(Path(made.name, f"{name}.npy"), values)
        return made

    def run() -> torch.Tensor:
        path = Path(folder().name)
        list(_processes(cores).map(functools.partial(_solve, params, path), range(count)))
        return torch.from_numpy(_opened(path, "q"))

    return run


def _solve(params: dict[str, Any], folder: Path, image: int) -> None:
    unary, photograph, q = (_opened(folder, name) for name in ("unary", "image", "q"))
    q[image] = pydensecrf(params, unary[image], photograph[image])


def _opened(folder: Path, name: str) -> numpy.ndarray:
    return numpy.load(folder / f"{name}.npy", mmap_mode="r+")


def pydensecrf(params: Mapping[str, Any], unary: numpy.ndarray, image: numpy.ndarray) -> numpy.ndarray:
    """Probabilities [labels, H, W] of energies like them and an image [3, H, W] in 0..255."""
    from pydensecrf import densecrf

    return solve(densecrf, params, unary, image)


def solve(
    densecrf: Any, params: Mapping[str, Any], unary: numpy.ndarray, image: numpy.ndarray, **options: Any
) -> numpy.ndarray:
    """The same by pydensecrf or what replaces it; `options` are its class's."""
    labels, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, labels, **options)
    crf.setUnaryEnergy(numpy.ascontiguousarray(unary.reshape(labels, -1), dtype=numpy.float32))
    crf.addPairwiseGaussian(sxy=params["gamma"], compat=params["gaussian_weight"])
    rgb = numpy.ascontiguousarray(image.transpose(1, 2, 0)).astype(numpy.uint8)
    weight = params["bilateral_weight"]
    crf.addPairwiseBilateral(sxy=params["alpha"], srgb=params["beta"], rgbim=rgb, compat=weight)
    return numpy.array(crf.inference(params["iterations"])).reshape(labels, height, width)
