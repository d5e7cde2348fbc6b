"""segfast's own way through each operator case: the backend is the caller's choice, as for any user."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

import segfast
from benchmarks import crf_peers
from benchmarks.cases import is_crf
from benchmarks.peers import Peer
from benchmarks.timing import Candidate
from benchmarks.trial import Formula, Tensors, Trial
from segfast.nn import BilinearUpsample


def ours(trial: Trial) -> Iterator[Peer]:
    """The fused operator, on a GPU beside what "auto" takes, and its other forms."""
    case = trial.case
    if is_crf(case):
        yield from crf_peers.ours(trial)
        return
    function: Formula = _aspp(trial) if case.op == "aspp" else case.ours
    tensors = trial.tensors if case.op == "aspp" else case.prepared(trial.tensors)
    candidate = Candidate("segfast", trial.bind(function, tensors), ours=True)
    yield candidate
    if trial.device.type == "cuda":
        yield on_auto(candidate)
    if case.family == "segmentation_head":
        yield Candidate("segfast_nchw", trial.bind(function, trial.contiguous()), ours=True)
    if case.op == "separable_conv2d":
        yield from _forms(trial, function, tensors)
    if case.params.get("weight") == "bilinear" and case.direction == "forward":
        module = BilinearUpsample(case["s"], case["k"], case["p"]).to(trial.device)
        functions = {"segfast": function, "segfast_module": lambda t: module(t["x"])}
        yield Candidate("segfast_module", trial.bind(functions["segfast_module"]), ours=True)
        for name, plain in functions.items():
            yield Candidate(f"{name}_nchw", trial.bind(plain, trial.contiguous()), ours=True)


def on_auto(candidate: Candidate) -> Candidate:
    """The same on backend "auto", whichever is in force: what a user gets, with the choices there are."""

    def run() -> Any:
        with segfast.backend("auto"):
            return candidate.run()

    return dataclasses.replace(candidate, name=f"{candidate.name}_auto", run=run)


def _aspp(trial: Trial) -> Formula:
    """The module with the case's weights: its own ones in a forward, the differentiated ones else."""
    case, t = trial.case, trial.tensors
    aspp = segfast.nn.ASPP(case["ci"], case["rates"], case["co"]).to(trial.device, case.torch_dtype).eval()
    rates = range(len(case["rates"]))
    names = {"weight": "convs.0.0.weight", "pool": f"convs.{len(rates) + 1}.1.weight"}
    names |= {f"rate{i}": f"convs.{i + 1}.0.weight" for i in rates} | {"project": "project.0.weight"}
    statistics = {"running_mean": "mean", "running_var": "var", "weight": "gamma", "bias": "beta"}
    with torch.no_grad():
        for module in aspp.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for name, ours in statistics.items():
                    getattr(module, name).copy_(t[ours])
        for name, ours in names.items():
            parameter = aspp.get_parameter(ours)
            parameter.data = t[name]
    aspp.requires_grad_(False)
    if case.direction == "forward":
        return lambda t: aspp(t["x"])
    return lambda t: torch.func.functional_call(aspp, {names[name]: t[name] for name in names}, (t["x"],))


def _forms(trial: Trial, function: Formula, tensors: Tensors) -> Iterator[Peer]:
    """A separable convolution in each of its forms, whichever is chosen; none where ATen serves the call."""
    if importlib.util.find_spec("triton") is None:
        return
    from segfast.kernels import (
        architecture,
        candidates,
        override_tile,
        record_launches,
        record_problems,
        shared_memory_limit,
    )

    with record_problems() as asked, record_launches():
        trial.bind(function, tensors)()
    forward = next((p for p in asked if p.operation == "separable_conv2d_forward"), None)
    if forward is None:
        return
    device = trial.device
    known = candidates(forward, architecture(device), shared_memory_limit(device))

    def forced(tile: Any) -> Callable[[], Any]:
        run, launches = trial.bind(function, tensors), {}

        def call() -> Any:
            with override_tile(forward.operation, tile, launches):
                return run()

        return call

    for form in ("fused", "two kernels"):
        tile = next(tile for tile in known if tile.form == form)
        name = f"segfast_{form.replace(' ', '_')}"
        yield Candidate(name, forced(tile), ours=True, note=str(tile))
