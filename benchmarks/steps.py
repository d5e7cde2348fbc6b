"""The steps of a GPU run, in the order of its parts: a worker process takes one.

What is proven and chosen lands where the product looks for it, in `SEGFAST_CACHE`, which is the run's folder.
"""

import importlib
import math
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

import segfast
from benchmarks.cases import CASES, DIRECTIONS, Case, directions, find, headline
from benchmarks.model_trial import ModelTrial
from benchmarks.ours import ours
from benchmarks.peers import Peer
from benchmarks.session import WRONG, Session, fp32_precision, log, say
from benchmarks.suite import AnyTrial, candidates, make_trial
from benchmarks.timing import Candidate
from segfast._optimize import measure
from segfast.ops import FAMILIES, _proofs
from segfast.ops._choice import collect
from segfast.ops._prove import DTYPES
from segfast.ops._prove_apart import compile_proofs, prove_apart

# Models that calls are chosen for and that are measured whole, each at batch 8 and 1.
MODELS = ("unet_572", "deeplabv3plus_mobilenetv2_513", "fcn8s_vgg16_500")
FIRST_DTYPES = (torch.bfloat16, torch.float32)
DRY_PROOFS = 1  # of one family: some take half a minute in the interpreter
DRY_SECONDS = 1.0  # for the choices of one model in a dry run
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


def compile_kernels(session: Session) -> None:
    """Before anything runs: what the proofs launch, in parallel processes."""
    for i, dtype in enumerate(() if session.dry else FIRST_DTYPES):
        if session.is_over(i, len(FIRST_DTYPES), "dtypes"):
            break
        if session.begins(str(dtype).removeprefix("torch.")):
            compile_proofs(session.device, (dtype,), _families(session))


def prove(session: Session) -> None:
    """Every kernel and direction on odd shapes against fp64, in bf16 and then in fp32; remembered.

    Those that were judged before are not run again.
    """
    _prove(session, FIRST_DTYPES)


def prove_all(session: Session) -> None:
    """The same in every dtype."""
    _prove(session, DTYPES)


def _prove(session: Session, dtypes: tuple[torch.dtype, ...]) -> None:
    families_wanted = _families(session)
    if session.dry:
        families_wanted, dtypes = families_wanted[:1], (torch.float32,)
    wrong = False
    for i, dtype in enumerate(dtypes):
        if session.is_over(i, len(dtypes), "dtypes"):
            break
        name = str(dtype).removeprefix("torch.")
        families = [family for family in families_wanted if session.begins(f"{family} {name}")]
        # Side by side: they are in processes of their own, which take most of the time to start.
        with ThreadPoolExecutor(len(FAMILIES)) as pool:
            made = pool.map(lambda family, dtype=dtype: _proof(session, family, dtype), families)
            for family, rows in zip(families, made, strict=True):
                good = sum(row.passed for row in rows)
                wrong |= good < len(rows)
                verdict = f"{good} of {len(rows)} right" if rows else "proven before"
                say(f"  {family} {name}: {verdict}")
    if wrong:
        raise SystemExit(WRONG)


def _families(session: Session) -> list[str]:
    return [family for family in FAMILIES if session.family in (None, family)]


def _proof(session: Session, family: str, dtype: torch.dtype) -> list:
    """The rows of one family in processes of their own; none where all of it was judged before."""

    def tell(row) -> None:
        log(str(row))
        if not row.passed:
            say(f"  {row}")

    if session.dry:  # which proves nothing, and keeps nothing
        rows = list(prove_apart(session.device, (dtype,), DRY_PROOFS, (family,)))
        for row in rows:
            tell(row)
        return rows
    operations = importlib.import_module(f"segfast.ops.{family}").OPERATIONS
    if not _proofs.unjudged(operations, dtype, session.device):
        return []
    return _proofs.prove_family(family, session.device, (dtype,), tell)


def choose(session: Session) -> None:
    """Choose what "auto" runs for the calls of the headline rows, forward and then in training."""
    for i, direction in enumerate(("forward", "train")):
        if session.is_over(i, 2, "directions"):
            break
        if session.begins(direction):
            calls = _calls(session, direction)
            budget = DRY_SECONDS if session.dry else session.left() / (2 - i)
            done = measure.measure(calls, session.device, budget)
            say(f"  {done} of {len(calls)} calls measured")


def _calls(session: Session, direction: str) -> list:
    """The calls that ours makes in the headline rows."""
    calls = {}
    for case in _headline(session, direction):
        trial = make_trial(case, session.device)
        candidate = next(iter(ours(trial)))
        assert isinstance(candidate, Candidate)
        with segfast.backend("auto"), fp32_precision(case.dtype), collect() as collected:
            candidate.run()
        calls |= collected.counts
        del trial, candidate
        session.check_context()
    return list(calls)


def headline_rows(session: Session) -> None:
    """The headline rows, ours beside every peer: forward, the training step, torch.compile beside both."""
    session.measure_ceilings()
    for direction in ("forward", "train"):
        session.run_cases(_headline(session, direction))
    if not session.tiny:
        for direction in ("forward", "train"):
            session.run_cases(_headline(session, direction), _with_compile, "compiled")


def _with_compile(trial: AnyTrial) -> list[Peer]:
    return candidates(trial, compiled=True)


def _headline(session: Session, direction: str) -> list[Case]:
    return [case.replace(direction=direction) for case in session.selected(headline())]


def tune(session: Session) -> None:
    """`segfast.optimize` of the models: what every call runs, first with few tiles, then with all."""
    cases = _models(session)
    for label in ["few tiles"] if session.tiny else ["few tiles", "all tiles"]:
        for i, case in enumerate(cases):
            if session.is_over(i, len(cases), f"models with {label}"):
                return
            if session.begins(f"{case.key} {label}"):
                budget = DRY_SECONDS if session.dry else max(1.0, session.left() / (len(cases) - i))
                say(f"  {_optimized(session, case, budget, label == 'all tiles')}")
                session.check_context()


def _optimized(session: Session, case: Case, budget: float, thorough: bool) -> str:
    """A sentence on what became of `segfast.optimize` for a model."""
    try:
        trial = make_trial(case, session.device)
        assert isinstance(trial, ModelTrial)
        with segfast.backend("auto"), fp32_precision(case.dtype):
            network = trial.optimized(budget, thorough)
        return str(segfast.report(network).gain or "nothing was chosen")
    except Exception as error:
        log(traceback.format_exc())
        return f"{type(error).__name__}: {str(error)[:200]}"


def models(session: Session) -> None:
    """Whole models, forward and training step: eager, optimized, then torch.compile beside these two."""
    session.measure_ceilings()
    cases = _models(session)
    if session.tiny:
        session.run_cases(cases)
        return
    large, small = ([case for case in cases if (case["n"] > 1) == several] for several in (True, False))
    default, most = COMPILE_MODES
    session.run_cases(large)
    session.run_cases([case for case in large if case.direction == "forward"], _compiled(default), default)
    session.run_cases(small)
    # Those that were compiled already are passed over.
    session.run_cases(cases, _compiled(default), default)
    session.run_cases(cases, _compiled(most), most)


def _compiled(mode: str) -> Callable[[AnyTrial], list[Peer]]:
    def made(trial: AnyTrial) -> list[Peer]:
        assert isinstance(trial, ModelTrial)
        return [trial.eager(), trial.compiled(mode), *trial.ours()]

    return made


def _models(session: Session) -> list[Case]:
    """Batch 8 first."""
    names = [name for name in MODELS if not session.names or name in session.names]
    cases = session.selected([find(name + ending) for ending in ("", "_n1") for name in names])
    return [case.replace(direction=direction) for case in cases for direction in ("forward", "train")]


def layers(session: Session) -> None:
    """Every case of one family, then its gradients, ours beside the peers."""
    session.measure_ceilings()
    cases = session.selected(CASES)
    gradients = [(direction, case) for case in cases for direction in directions(case)]
    gradients.sort(key=lambda work: DIRECTIONS.index(work[0]))
    session.run_cases(cases + [case.replace(direction=d) for d, case in gradients])


def full(session: Session) -> None:
    """The checks that take longer than a proof: fuzz, offsets past 2**31, CUDA graphs, streams, sanitizer."""
    from benchmarks.full import checks

    count = wrong = 0
    with segfast.backend("triton"):
        for name, passed, note in checks(session.device):
            count, wrong = count + 1, wrong + (not passed)
            say(f"  {'ok' if passed else 'WRONG':6} {name}  {note}")
            if session.left() <= 0:
                say("  time is up: the rest is not run")
                break
    say(f"  {count - wrong} of {count} checks passed")
    if wrong:
        raise SystemExit(WRONG)


STEPS: Mapping[str, Callable[[Session], None]] = {
    "compile": compile_kernels,
    "prove": prove,
    "choose": choose,
    "headline": headline_rows,
    "tune": tune,
    "models": models,
    "layers": layers,
    "prove_all": prove_all,
    "full": full,
}
# The steps of each part, and their seconds at most.
PARTS: Mapping[str, Mapping[str, float]] = {
    "first": {"compile": 70, "prove": 90, "choose": 90, "headline": math.inf},
    "second": {"tune": 160, "models": math.inf},
    "layers": {"layers": math.inf},
    "full": {"prove_all": 200, "full": math.inf},
}
