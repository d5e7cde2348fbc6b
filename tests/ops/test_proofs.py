"""Remembered proofs: found again, merged, and no longer counted where something else runs."""

import json
import warnings

import pytest
import torch
import triton

from segfast.kernels import source_digest
from segfast.ops import _gpu, _gpu_tune, _proofs, _prove_apart
from segfast.ops._choice_files import measured_folders
from segfast.ops._prove import ProofRow
from tests.conftest import is_taken
from tests.ops.test_gpu import CALL

FORWARD, GRADIENT = "conv2d_forward", "conv2d_grad_weight"
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu(pretended_gpu):
    return pretended_gpu


def row(operation=FORWARD, passed=True, dtype="bfloat16", case="3x3"):
    return ProofRow(operation, dtype, case, 0.0 if passed else 1.0, 0.5, passed)


def is_proven(operation=FORWARD, dtype=torch.bfloat16):
    """As the next process sees it."""
    _proofs.forget()
    return _proofs.proven(operation, dtype, DEVICE)


def proof(**other):
    known = {"passed": True, "source": source_digest(FORWARD), "triton": triton.__version__}
    return known | other


def put(content, folder=-1):
    path = measured_folders()[folder] / "proven.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    _proofs.forget()


def test_what_is_written_is_found(gpu):
    assert not is_proven()
    _proofs.write([row(), row(case="5x5"), row(GRADIENT, dtype="float32")], DEVICE)
    assert _proofs.proven(FORWARD, torch.bfloat16, DEVICE)  # in this process at once
    assert is_proven() and is_proven(GRADIENT, torch.float32)
    assert not is_proven(GRADIENT) and not is_proven(dtype=torch.float32)
    assert _proofs.judged(DEVICE) == {f"{FORWARD}.bfloat16": True, f"{GRADIENT}.float32": True}
    kept = json.loads(_proofs.file().read_text())[gpu][f"{FORWARD}.bfloat16"]
    assert kept["cases"] == 2 and kept["torch"] == torch.__version__ and len(kept["date"]) == 10
    assert proof().items() <= kept.items()


def test_one_case_that_is_wrong_disproves_its_operation_alone():
    _proofs.write([row(), row(passed=False), row(), row(GRADIENT)], DEVICE)
    assert not is_proven() and is_proven(GRADIENT)
    assert _proofs.judged(DEVICE)[f"{FORWARD}.bfloat16"] is False


def test_writing_adds_and_the_newest_counts():
    _proofs.write([row()], DEVICE)
    _proofs.write([row(GRADIENT)], DEVICE)
    assert is_proven() and is_proven(GRADIENT)
    _proofs.write([row(passed=False)], DEVICE)
    assert not is_proven() and is_proven(GRADIENT)
    _proofs.write([row()], DEVICE)
    assert is_proven()


def test_another_gpus_do_not_count(gpu, monkeypatch):
    _proofs.write([row()], DEVICE)
    monkeypatch.setattr(_gpu, "_names", {0: "nvidia-other"})
    assert not is_proven()
    _proofs.write([row(GRADIENT)], DEVICE)
    assert set(json.loads(_proofs.file().read_text())) == {gpu, "nvidia-other"}
    monkeypatch.setattr(_gpu, "_names", {0: gpu})
    assert is_proven() and not is_proven(GRADIENT)


@pytest.mark.parametrize("folder", [0, -1], ids=["brought by the package", "the user's own"])
def test_both_folders_are_read(gpu, folder):
    put({gpu: {f"{FORWARD}.bfloat16": proof()}}, folder)
    assert is_proven()


def test_the_users_own_prevail(gpu):
    put({gpu: {f"{FORWARD}.bfloat16": proof(), f"{FORWARD}.float32": proof()}}, 0)
    _proofs.write([row(passed=False)], DEVICE)
    assert not is_proven() and is_proven(dtype=torch.float32)
    # One that counts no more says nothing about what the package brings.
    put({gpu: {f"{FORWARD}.bfloat16": proof(passed=False, source="of other code")}})
    assert is_proven()


MAJOR, MINOR = map(int, triton.__version__.split(".")[:2])


@pytest.mark.parametrize(
    ("version", "counts"),
    [(f"{MAJOR}.{MINOR}.99", True), (f"{MAJOR}.{MINOR + 1}.0", False), (f"{MAJOR + 1}.{MINOR}.0", False)],
)
def test_it_counts_for_the_minor_version_of_triton_that_it_was_made_with(gpu, version, counts):
    put({gpu: {f"{FORWARD}.bfloat16": proof(triton=version)}})
    assert is_proven() is counts
    known = _proofs.unjudged([FORWARD, GRADIENT], torch.bfloat16, DEVICE)
    assert known == ([GRADIENT] if counts else [FORWARD, GRADIENT])


@pytest.mark.parametrize("lacking", ["source", "triton", "passed"])
def test_one_of_other_device_code_or_without_its_particulars_does_not_count(gpu, lacking):
    changed = {"source": "0" * 16, "triton": "", "passed": False}
    put({gpu: {f"{FORWARD}.bfloat16": proof(**{lacking: changed[lacking]})}})
    assert not is_proven()
    whole = proof()
    del whole[lacking]
    put({gpu: {f"{FORWARD}.bfloat16": whole, "conv5d_forward.bfloat16": proof()}})
    assert not is_proven()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"nvidia-h200": 1}', '{"nvidia-h200": {"conv2d_forward.bfloat16": 1}}']
)
def test_a_broken_file_is_a_warning_and_a_fresh_start(text):
    put(text)
    with pytest.warns(UserWarning, match=r"proven\.json cannot be read .*ignored"):
        assert not is_proven()
    with pytest.warns(UserWarning, match="ignored"):
        _proofs.write([row()], DEVICE)
    assert is_proven()


def test_a_cache_that_cannot_be_written_is_a_warning_and_holds_for_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        _proofs.write([row()], DEVICE)
    assert _proofs.proven(FORWARD, torch.bfloat16, DEVICE)


def test_processes_that_write_at_once_take_turns(monkeypatch):
    turns = []

    def watched(function):
        def call(path):
            turns.append((function.__name__, is_taken(path)))
            return function(path)

        return call

    is_proven()  # reads what the package brings, which nobody writes
    for name in ("_content", "temporary_beside"):
        monkeypatch.setattr(_proofs, name, watched(getattr(_proofs, name)))
    _proofs.write([row()], DEVICE)
    assert turns == [("_content", True), ("temporary_beside", True)]
    assert not is_taken(_proofs.file())


def test_a_family_is_proven_and_remembered(monkeypatch):
    asked, told = [], []

    def prove(device, dtypes, families):
        asked.append((device, dtypes, families))
        yield from (row(), row(GRADIENT))

    monkeypatch.setattr(_proofs, "prove", prove)
    monkeypatch.setattr(_proofs, "prove_apart", prove)
    for apart in (False, True):
        rows = _proofs.prove_family("conv2d", DEVICE, [torch.bfloat16], told.append, apart)
        assert rows == [row(), row(GRADIENT)]
    assert told == 2 * rows and asked == 2 * [(DEVICE, (torch.bfloat16,), ("conv2d",))]
    assert is_proven()


def test_a_process_that_does_not_begin_has_disproven_nothing(monkeypatch):
    rows = [row()._replace(case=_prove_apart.NOTHING_RUN, passed=False)]
    monkeypatch.setattr(_proofs, "prove_apart", lambda *args, **kwargs: rows)
    assert _proofs.prove_family("conv2d", DEVICE, [torch.bfloat16]) == rows
    assert _proofs.unjudged(["conv2d_forward"], torch.bfloat16, DEVICE) == ["conv2d_forward"]


@pytest.mark.parametrize("passed", [True, False])
def test_what_optimize_cannot_prove_is_a_line(passed, monkeypatch):
    rows = [row(), row(GRADIENT)._replace(passed=passed, note="the process ended with code 7")]
    monkeypatch.setattr(_proofs, "prove_apart", lambda *args, **kwargs: rows)
    monkeypatch.setattr(_prove_apart, "compile_proofs", lambda *args: None)
    told = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _gpu_tune.prove_missing([], DEVICE, told.append, [("conv2d", torch.bfloat16)])
    assert told == rows
    said = [str(each.message) for each in warned]
    assert len(said) == (not passed) and all(GRADIENT in each and "code 7" in each for each in said)


def test_where_no_process_can_be_started_nothing_is_proven(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    monkeypatch.setattr(_prove_apart, "COMMAND", ("/nowhere/python",))
    with pytest.warns(UserWarning, match="no process can be started to prove"):
        _gpu_tune.prove_missing([], DEVICE, others=[("conv2d", torch.bfloat16)])


def test_only_what_nothing_is_known_of_is_proven(monkeypatch):
    asked = []

    def prove_family(family, device, dtypes, on_row, apart):
        asked.append((family, dtypes))
        names = ("conv2d_forward", "conv2d_grad_input", "conv2d_grad_weight", "parallel_conv2d_forward")
        rows = [row(name, False, str(dtype)[6:]) for dtype in dtypes for name in names]
        _proofs.write(rows, device)

    def compile_proofs(device, dtypes, families):
        compiled.append((families, dtypes))

    compiled = []
    monkeypatch.setattr(_gpu_tune, "prove_family", prove_family)
    monkeypatch.setattr(_prove_apart, "compile_proofs", compile_proofs)
    calls = [CALL, CALL._replace(gradients=True), CALL._replace(dtype=torch.float16)]
    expected = [("conv2d", (torch.bfloat16, torch.float16))]
    for _ in range(2):
        _gpu_tune.prove_missing(calls, DEVICE)
        assert asked == expected  # also what was found wrong is not tried again
    _gpu_tune.prove_missing(calls, DEVICE, others=[("dense_crf", torch.float32)])
    assert asked == [*expected, ("dense_crf", (torch.float32,))]
    # All that is to be proven is compiled at once, before.
    two = [torch.bfloat16, torch.float16]
    assert compiled == [(["conv2d"], two), (["dense_crf"], [torch.float32])]
    monkeypatch.setattr(_gpu_tune, "APART", False)
    _gpu_tune.prove_missing([], DEVICE, others=[("dense_crf", torch.float16)])
    assert len(asked) == 3 and len(compiled) == 2
