"""Choices on disk: found again, merged, shipped, and no harm where a file is broken or cannot be written."""

import json
import multiprocessing

import pytest

import segfast
from segfast.ops import _choice, _choice_files
from segfast.ops._choice import ATEN, Choice, choices
from tests.ops.test_choice_candidates import CONV2D, TRANSPOSED

FOUND = {CONV2D: Choice("onednn", {"onednn": 1.25, ATEN: 2.5}), TRANSPOSED: Choice(ATEN, {})}


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
        "text", ["", "{", "[]", '{"choices": 1}', '{"choices": [{"choice": "onednn", "us": {}}]}', "\0"]
    )
    def test_a_broken_file_is_a_warning_and_a_fresh_start(self, cache, text):
        path = _choice_files.path()
        path.parent.mkdir(parents=True)
        path.write_text(text)
        with pytest.warns(UserWarning, match="ignored"):
            assert not choices().measured
        with pytest.warns(UserWarning, match="ignored"):
            _choice_files.write(FOUND)
        assert _choice_files.read() == FOUND

    def test_a_cache_that_cannot_be_written_is_a_warning(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "file"))
        _choice_files._warn_once.cache_clear()
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
        content["machine"]["cpu"] = "another"
        shipped.write_text(json.dumps(content))
        _choice.forget_choices()
        with pytest.warns(UserWarning, match="another machine .cpu differ"):
            assert segfast.load_choices(shipped) == 0
        assert not choices().measured

    def test_what_is_no_such_file_is_an_error(self, tmp_path):
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(ValueError, match="save_choices"):
            segfast.load_choices(tmp_path / "other.json")
        with pytest.raises(FileNotFoundError):
            segfast.load_choices(tmp_path / "missing.json")


def _write_sizes(start: int) -> None:
    for i in range(10):
        size = 20 + start + i
        _choice_files.write({CONV2D._replace(input=(1, 8, size, size)): Choice(ATEN, {})})
