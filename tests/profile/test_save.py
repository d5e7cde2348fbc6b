"""The files of a profile: all of them whole, and none that the user gave overwritten without being asked."""

import csv
import json
import sys

import pytest

from segfast._errors import UserError
from segfast._profile.save import FILES, claim_files, save
from tests.profile.profiles import network, optimized


def test_all_files_are_written_and_none_is_left_over(tmp_path):
    folder = tmp_path / "new" / "folder"
    paths = save(optimized(), folder)
    assert (
        paths
        == [folder / name for name in FILES]
        == [folder / name for name in ("profile.csv", "trace.json", "profile.html", "roofline.png")]
    )
    assert sorted(folder.iterdir()) == sorted(paths)
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert (folder / "profile.html").read_text().startswith("<!doctype html>")
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_every_field_of_every_row(tmp_path):
    shown = optimized()
    save(shown, tmp_path)
    with (tmp_path / "profile.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [*shown.rows, *shown.optimized.rows]
    assert [line["model"] for line in lines] == ["given"] * 5 + ["optimized"] * 4
    for line, row in zip(lines, rows, strict=True):
        for name in ("name", "kind", "direction", "bound", "dtype", "memory_format", "advice"):
            assert line[name] == getattr(row, name)
        for name in ("start_us", "us", "p20_us", "p80_us", "flops", "bytes", "intensity"):
            assert float(line[name]) == getattr(row, name)
        assert line["roof_share"] == ("" if row.roof_share is None else str(row.roof_share))
        assert line["peak_bytes"] == ("" if row.peak_bytes is None else str(row.peak_bytes))
    assert lines[1]["output"] == "2x8x16x16"
    assert lines[1]["candidates"] == "aten 1000; onednn 500"


def test_own_files_are_replaced(tmp_path):
    save(network(3), tmp_path)
    save(network(4), tmp_path)
    assert (tmp_path / "profile.csv").read_text().count("\n") == 7


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_someone_elses_stays(tmp_path, name):
    (tmp_path / name).write_text("a,b\n1,2\n")
    for write in (claim_files, lambda folder: save(network(3), folder)):
        with pytest.raises(UserError, match=f"{name}: exists and is not a file that segfast wrote"):
            write(tmp_path)
    assert (tmp_path / name).read_text() == "a,b\n1,2\n" and len(list(tmp_path.iterdir())) == 1
    save(network(3), tmp_path, force=True)
    assert (tmp_path / name).read_bytes() != b"a,b\n1,2\n"


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert [path.name for path in save(network(3), tmp_path)] == list(FILES[:-1])
    assert not (tmp_path / "roofline.png").exists()
