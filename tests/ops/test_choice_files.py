"""Choices on disk: found again, merged, shipped, and no harm where a file is broken or cannot be written."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import segfast
from segfast.ops import _choice, _choice_files, _gpu
from segfast.ops._call import CANDIDATES
from segfast.ops._choice import ATEN, Choice, choices
from tests.conftest import is_taken
from tests.forget import forget
from tests.ops.test_choice_candidates import CONV2D, TRANSPOSED
from tests.ops.test_gpu import CALL

ROOT = Path(__file__).resolve().parents[2]
FOUND = {CONV2D: Choice("onednn", {"onednn": 1.25, ATEN: 2.5}), TRANSPOSED: Choice(ATEN, {})}


@pytest.mark.parametrize("turn", ["before", "after"])
def test_a_test_knows_nothing_of_others(turn, cache):
    """Of two the one that runs later fails if what the first measured came into it."""
    assert not cache.exists() and not choices().measured
    _choice_files.write(FOUND)
    _choice_files.remember(CONV2D, FOUND[CONV2D])
    assert cache.exists() and choices().measured


class TestFiles:
    def test_what_is_written_is_read(self, cache):
        _choice_files.write(FOUND)
        assert _choice_files.read() == FOUND
        assert choices().find(CONV2D) == FOUND[CONV2D]

    def test_writing_adds(self, cache):
        for call, choice in FOUND.items():
            _choice_files.write({call: choice})
        assert _choice_files.read() == FOUND

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "{}",
            '{"choices": 1}',
            "[1]",
            '[{"choices": []}]',
            '[{"machine": HERE, "choices": 1}]',
            '[{"machine": HERE, "choices": [{"choice": "onednn", "us": {}}]}]',
            '[{"machine": HERE, "choices": [ROW]}]',
            "\0",
        ],
    )
    def test_a_broken_file_is_a_warning_and_a_fresh_start(self, cache, text):
        path = _choice_files.path()
        path.parent.mkdir(parents=True)
        untimed = {**_choice_files.call_row(CONV2D), "choice": "onednn", "us": {ATEN: 2.5}}
        text = text.replace("ROW", json.dumps(untimed))
        path.write_text(text.replace("HERE", json.dumps(_choice_files.machine())))
        with pytest.warns(UserWarning, match="ignored"):
            assert not choices().measured
        with pytest.warns(UserWarning, match="ignored"):
            _choice_files.write(FOUND)
        assert _choice_files.read() == FOUND

    def test_a_cache_that_cannot_be_written_is_a_warning(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "file"))
        with pytest.warns(UserWarning, match="cannot be written"):
            _choice_files.write(FOUND)

    def test_processes_that_write_at_once_lose_nothing(self, cache):
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=_write_sizes, args=(start,)) for start in (0, 10)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        assert sorted(call.input[2] for call in _choice_files.read()) == [
            20 + start + i for start in (0, 10) for i in range(10)
        ]

    def test_they_take_turns(self, cache, monkeypatch):
        turns = []

        def watched(function):
            def call(file, *args):
                turns.append((function.__name__, is_taken(file)))
                return function(file, *args)

            return call

        for name in ("_read", "replace"):
            monkeypatch.setattr(_choice_files, name, watched(getattr(_choice_files, name)))
        _choice_files.write(FOUND)
        assert turns == [("_read", True), ("replace", True)]
        assert not is_taken(_choice_files.path())

    def test_where_it_is(self, monkeypatch, tmp_path):
        for name in ("SEGFAST_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert _choice_files.path().parent == tmp_path / "home" / ".cache" / "segfast" / "choices"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert _choice_files.path().parent == tmp_path / "xdg" / "segfast" / "choices"
        monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "own"))
        assert _choice_files.path().parent == tmp_path / "own" / "choices"

    def test_fewer_instructions_are_another_machine(self, monkeypatch):
        path = _choice_files.path()
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
        _choice_files.machine.cache_clear()
        try:
            assert _choice_files.path() != path
        finally:
            monkeypatch.undo()
            _choice_files.machine.cache_clear()

    def test_other_versions_have_another_file(self, monkeypatch):
        path = _choice_files.path()
        here = _choice_files.machine()
        for key in here:
            monkeypatch.setattr(_choice_files, "machine", lambda key=key: {**here, key: "another"})
            assert _choice_files.path() != path

    def test_saved_choices_are_loaded(self, cache, tmp_path):
        for call, choice in FOUND.items():
            choices().add(call, choice)
        shipped = tmp_path / "model.json"
        assert segfast.save_choices(shipped) == 2
        _choice.forget_choices()
        assert not choices().measured
        assert segfast.load_choices(shipped) == 2
        assert choices().measured == FOUND
        _choice.forget_choices()
        assert choices().measured == FOUND  # in the cache too

    def test_those_of_another_machine_are_not(self, cache, tmp_path):
        shipped = tmp_path / "model.json"
        choices().add(CONV2D, Choice(ATEN, {}))
        segfast.save_choices(shipped)
        content = json.loads(shipped.read_text())
        here = content[0]["machine"]["cpu"]
        content[0]["machine"]["cpu"] = "another"
        shipped.write_text(json.dumps(content))
        _choice.forget_choices()
        with pytest.warns(UserWarning) as warned:
            assert segfast.load_choices(shipped) == 0
        (said,) = [str(each.message) for each in warned]
        assert said == f"segfast: nothing of {shipped} is taken: cpu is {here} here, another there"
        assert not choices().measured

    def test_a_choice_that_was_not_timed_is_an_error(self, cache, tmp_path):
        shipped = tmp_path / "model.json"
        choices().add(CONV2D, FOUND[CONV2D])
        segfast.save_choices(shipped)
        content = json.loads(shipped.read_text())
        del content[0]["choices"][0]["us"]["onednn"]
        shipped.write_text(json.dumps(content))
        _choice.forget_choices()
        with pytest.raises(ValueError, match=r"model\.json .*the choice onednn is not .* timed: aten"):
            segfast.load_choices(shipped)
        assert not choices().measured

    def test_what_is_no_such_file_is_an_error(self, tmp_path):
        for text in ("{}", '{"a": 1}', "[1]", "x", '[{"machine": 1, "choices": []}]'):
            (tmp_path / "other.json").write_text(text)
            with pytest.raises(ValueError, match="save_choices"):
                segfast.load_choices(tmp_path / "other.json")
        with pytest.raises(FileNotFoundError):
            segfast.load_choices(tmp_path / "missing.json")


def test_a_change_of_any_file_here_is_another_machine(tmp_path, monkeypatch):
    """Also of what candidates share, and of how they are verified and timed."""
    copy = shutil.copytree(Path(_choice_files.__file__).parent, tmp_path / "ops")
    monkeypatch.setattr(_choice_files, "__file__", str(copy / "_choice_files.py"))
    digest = _choice_files.machine.__wrapped__()["source"]
    assert digest == _choice_files.machine()["source"]
    seen = {digest}
    candidates = {
        function.__module__ for each in CANDIDATES.values() for c in each.values() for function in c[:3]
    }
    for name in (*candidates, "segfast.ops._epilogue", "segfast.ops._measure"):
        package, _, module = name.rpartition(".")
        assert package == "segfast.ops"
        with (copy / f"{module}.py").open("a") as file:
            file.write("# changed\n")
        digest = _choice_files.machine.__wrapped__()["source"]
        assert digest not in seen
        seen.add(digest)


# Options of several depths, and tiles of two kernels.
UP = CALL._replace(operation="up_concat", options=((2, 2), (0, 1), True, None), gradients=True)
TILES = (
    ("conv2d_forward", "ci8-co4-t9-g1-s1d1-bfloat16-p8", (64, 32, 16, 4, 3, 1, "")),
    ("conv2d_grad_weight", "ci8-co4-t9-g1-s1d1-bfloat16-p8", (16, 16, 32, 8, 2, 5, "fused")),
)
ON_GPU = {
    CALL: Choice("triton", {"triton": 10.25, ATEN: 20.5}, TILES),
    UP: Choice("parts", {}, (), ("triton",)),
}


class TestGPUs:
    @pytest.fixture(autouse=True)
    def gpu(self, pretended_gpu):
        return pretended_gpu

    def test_what_is_written_is_read(self, gpu, cache):
        _choice_files.write(ON_GPU | FOUND)
        assert _choice_files.read_gpu(gpu) == ON_GPU
        assert _choice_files.read() == FOUND
        written = json.loads(_choice_files.path(_choice_files.gpu_machine(gpu)).read_text())
        assert written[0]["choices"][0]["tiles"][0][0] == "conv2d_forward"
        assert len(list((cache / "choices").glob("*.json"))) == 2
        assert [type(part) for part in next(iter(_choice_files.read_gpu(gpu))).options[:2]] == [tuple, tuple]

    def test_writing_adds(self, gpu):
        for call, choice in ON_GPU.items():
            _choice_files.write({call: choice})
        assert _choice_files.read_gpu(gpu) == ON_GPU

    @pytest.mark.parametrize(
        "tiles",
        [
            ["conv2d_forward", "no pixels", [16, 16, 16, 4, 3, 1, ""]],
            ["conv2d_forward", "ci8-co4-p8", [16, 16]],
            ["conv2d_forward", "ci8-co4-p8"],
        ],
    )
    def test_tiles_that_are_none_make_the_file_a_warning(self, gpu, tiles):
        _choice_files.write(ON_GPU)
        file = _choice_files.path(_choice_files.gpu_machine(gpu))
        content = json.loads(file.read_text())
        content[0]["choices"][0]["tiles"] = [tiles]
        file.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match="cannot be read"):
            assert _choice_files.read_gpu(gpu) == {}

    @pytest.mark.parametrize("key", ["gpu", "architecture", "torch", "triton", "cudnn", "source"])
    def test_those_of_another_machine_are_not_read(self, gpu, key, monkeypatch):
        _choice_files.write(ON_GPU)
        other = {**_choice_files.gpu_machine(gpu), key: "another"}
        assert _choice_files.path(other) != _choice_files.path(_choice_files.gpu_machine(gpu))
        shutil.copy(
            _choice_files.path(_choice_files.gpu_machine(gpu)), _choice_files.path(other)
        )  # under its name
        assert _choice_files.read(other) == {}

    def test_the_users_own_prevail_over_those_the_package_brings(self, gpu):
        brought, own = _choice_files.measured_folders()
        _choice_files.write(ON_GPU)
        brought.mkdir()
        for file in own.glob("*.json"):
            file.rename(brought / file.name)
        assert _choice_files.read_gpu(gpu) == ON_GPU
        mine = {CALL: Choice(ATEN, {})}
        _choice_files.write(mine)
        assert _choice_files.read_gpu(gpu) == ON_GPU | mine
        shutil.rmtree(brought)
        assert _choice_files.read_gpu(gpu) == mine  # what the package brought was not copied

    def test_saved_choices_are_loaded_with_their_tiles(self, gpu, tmp_path):
        for call, choice in (FOUND | ON_GPU).items():
            _choice_files.remember(call, choice)
        shipped = tmp_path / "model.json"
        assert segfast.save_choices(shipped) == 4
        forget()
        shutil.rmtree(_choice_files.cache_folder(), ignore_errors=True)
        assert segfast.load_choices(shipped) == 4
        assert choices().measured == FOUND | ON_GPU
        assert _gpu.can_choose(0)
        forget()
        assert _choice_files.read_gpu(gpu) == ON_GPU  # in the cache too

    def test_those_of_the_cache_are_saved_though_nothing_has_run(self, gpu, tmp_path):
        _choice_files.write(ON_GPU | FOUND)
        forget()
        assert segfast.save_choices(tmp_path / "model.json") == 4

    def test_of_a_file_this_machine_takes_its_own_part(self, gpu, tmp_path):
        for call, choice in (FOUND | ON_GPU).items():
            _choice_files.remember(call, choice)
        shipped = tmp_path / "model.json"
        segfast.save_choices(shipped)
        content = json.loads(shipped.read_text())
        content[0]["machine"]["cpu"] = "another"
        shipped.write_text(json.dumps(content))
        forget()
        assert segfast.load_choices(shipped) == 2
        assert choices().measured == ON_GPU

    def test_what_differs_is_said_of_the_part_that_fits_best(self, gpu, tmp_path):
        cpu, here = _choice_files.machine(), _choice_files.gpu_machine(gpu)

        def said(*machines):
            shipped = tmp_path / "model.json"
            shipped.write_text(json.dumps([{"machine": each, "choices": []} for each in machines]))
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                assert segfast.load_choices(shipped) == 0
            head = f"segfast: nothing of {shipped} is taken: "
            return [str(each.message).removeprefix(head) for each in warned]

        other_cpu = cpu | {"cpu": "another", "torch": "1.0"}
        older = here | {"triton": "2.0.0"}
        expected = [f"triton is {here['triton']} here, 2.0.0 there"]
        assert said(other_cpu, older | {"torch": "1.0"}, older) == expected
        torch_differs = [f"torch is {cpu['torch']} here, 1.0 there"]
        assert said(other_cpu | {"cpu": cpu["cpu"]}, older | {"torch": "1.0"}) == torch_differs
        assert said(other_cpu, here) == []  # though it holds nothing
        assert said({"npu": "of tomorrow"}) == [f"it is of another machine, here is {cpu['cpu']} and {gpu}"]

    def test_a_machine_without_a_gpu_says_whose_choices_they_are(self, gpu, tmp_path, monkeypatch):
        _choice_files.remember(CALL, ON_GPU[CALL])
        segfast.save_choices(tmp_path / "model.json")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.warns(UserWarning, match="taken: it is of nvidia-h200, here is "):
            assert segfast.load_choices(tmp_path / "model.json") == 0

    @pytest.mark.parametrize("row", [{"operation": "conv5d"}, {"dtype": "strided"}, {"surplus": 1}])
    def test_a_row_that_is_no_call_makes_its_file_broken(self, gpu, row):
        _choice_files.write(ON_GPU)
        file = _choice_files.path(_choice_files.gpu_machine(gpu))
        content = json.loads(file.read_text())
        content[0]["choices"][0] |= row
        file.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match="ignored"):
            assert _choice_files.read_gpu(gpu) == {}


def _write_sizes(start: int) -> None:
    for i in range(10):
        size = 20 + start + i
        _choice_files.write({CONV2D._replace(input=(1, 8, size, size)): Choice(ATEN, {})})


def test_examples_in_docstrings_leave_the_users_cache_alone(tmp_path):
    """They measure by the real clock; here as if it were quiet, so that they would write."""
    (tmp_path / "quiet.py").write_text(
        "from segfast.ops import _measure\n_measure.quiet_check = lambda: lambda: True\n"
    )
    home = tmp_path / "home"
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment = {k: v for k, v in os.environ.items() if k != "SEGFAST_CACHE"} | places
    command = [sys.executable, "-m", "pytest", "-p", "quiet", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "segfast/ops/_choice.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    assert not list(home.rglob("*choices*"))
