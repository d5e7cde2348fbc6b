"""Rows, the report, and filing what a GPU run brought back."""

import json
import math
import subprocess
import types
from dataclasses import astuple

import pytest
import torch

from benchmarks import record, rows, timing
from benchmarks.cases import find
from benchmarks.environment import ROOT
from benchmarks.report import html_page, markdown, ratio, summary, write_report
from segfast.kernels import Tile, source_digest
from segfast.ops._choice import Choice
from segfast.ops._choice_files import file_name, gpu_source, replace
from segfast.ops._gpu_call import GpuCall

H200 = {"copy_gbs": 4300.0, "bf16_tflops": 790.0, "l2_gbs": 6600.0, "exp2_gops": 3700.0}


def _row(
    case="unet_up1", candidate="aten_nhwc", us=100.0, ours=False, status="ok", gpu="nvidia-h200", **more
):
    timed = timing.Timing(us, us - 1, us + 1, us + 5, us, us + 9, 20)
    measured = timing.Measurement(candidate, ours, status, "", 1e-3, timed if status == "ok" else None)
    measured.peak_mb = more.get("peak_mb", math.nan)
    columns = dict.fromkeys(rows.VERSIONS, "") | {"gpu": gpu, "commit": "abc", "date": "2026-01-01"}
    return rows.make_row("headline", find(case), measured, H200, columns, more.get("dry_run", False))


def _rows_file(folder, *found):
    folder.mkdir(exist_ok=True)
    rows.append_rows(folder / "rows.csv", found)
    return rows.read_rows(folder / "rows.csv")


def test_rows_survive_the_file(tmp_path):
    written = [
        _row(),
        _row(candidate="segfast", us=80.0, ours=True),
        _row(candidate="odd, name", status="failed"),
    ]
    for row in written:
        rows.append_rows(tmp_path / "rows.csv", [row])
    read = rows.read_rows(tmp_path / "rows.csv")
    assert [row["candidate"] for row in read] == ["aten_nhwc", "segfast", "odd, name"]
    assert read[1]["gpu_us"] == 80.0
    assert read[1]["ours"] is True
    assert math.isnan(read[2]["gpu_us"])
    assert read[0]["fraction"] == pytest.approx(rows.floor(find("unet_up1"), H200)[0] / 100, rel=1e-4)
    (tmp_path / "rows.csv").write_text("case,us\nunet_up1,3\n")
    with pytest.raises(ValueError, match="expected the columns"):
        rows.read_rows(tmp_path / "rows.csv")


def test_report_keeps_the_cases_where_the_peer_wins(tmp_path):
    found = _rows_file(
        tmp_path,
        _row(us=100.0),
        _row(candidate="segfast", us=50.0, ours=True),
        _row("unet_up2", us=30.0),
        _row("unet_up2", candidate="aten_nchw", us=90.0),
        _row("unet_up2", candidate="segfast", us=60.0, ours=True),
        _row("crf_321_160_3", candidate="<script>", status="failed"),
    )
    assert ratio(found[:2]) == pytest.approx(2.0)
    assert ratio(found[2:5]) == pytest.approx(0.5)  # against the fastest peer
    text = summary(found)
    assert "geometric mean of the ratios: 1" in text
    page = html_page(found)
    assert page.count("<table") == page.count("</table>") == 4
    assert page.count("data:image/png;base64,") == 1
    assert "<script>" not in page
    assert "unet_up2" in page
    assert "http" not in page.replace("http-equiv", "")
    write_report(found, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page


def test_report_sets_a_layer_beside_its_block(tmp_path):
    found = _rows_file(
        tmp_path,
        _row("mobilenetv2_dw144", us=100.0),
        _row("mobilenetv2_dw144", candidate="segfast", us=25.0, ours=True),
        _row("mobilenetv2_dw144_layer", us=60.0),
        _row("mobilenetv2_dw144_layer", candidate="segfast", us=20.0, ours=True),
        _row("aspp_dw_d12_block", us=70.0),
    )
    line = "| mobilenetv2_dw144 | bfloat16 | forward | 60 | 20 | 3 | 100 | 25 | 4 |"
    assert line in markdown(found)
    # A block whose layer was not measured has no line.
    assert "| aspp_dw_d12_block | bfloat16 | forward |" not in markdown(found)
    assert "the layer alone" in html_page(found)
    assert "the layer alone" not in html_page(found[:2])


def test_report_shows_both_forms_and_rates_the_chosen_one(tmp_path):
    found = _rows_file(
        tmp_path,
        _row("decoder_sep_256", us=100.0, peak_mb=300.0),
        _row("decoder_sep_256", candidate="segfast", us=50.0, ours=True, peak_mb=200.0),
        _row("decoder_sep_256", candidate="segfast_fused", us=60.0, ours=True, peak_mb=150.0),
        _row("decoder_sep_256", candidate="segfast_two_kernels", us=40.0, ours=True, peak_mb=210.0),
    )
    assert ratio(found) == pytest.approx(2.0)
    line = "| decoder_sep_256 | bfloat16 | forward | 60 | 40 | 50 | 100 | 200 | 150 | 300 |"
    assert line in markdown(found)
    assert "both forms" in html_page(found)
    assert "both forms" not in html_page(found[:2])


def test_report_of_a_cpu_claims_no_gpu_figure(tmp_path):
    found = _rows_file(tmp_path, _row(gpu="cpu"), _row(gpu="cpu", candidate="segfast", ours=True, us=50.0))
    assert "no GPU figure was taken" in html_page(found)
    assert "no GPU figure was taken" in summary(found)
    dry = _rows_file(tmp_path / "dry", _row(dry_run=True))
    assert "no GPU figure was taken" in summary(dry)
    assert "100" not in summary(dry)


def test_outputs_replace_only_themselves(tmp_path):
    from benchmarks.suite import write_outputs
    from segfast._errors import UserError

    folder = tmp_path / "benchmark"
    for us in (100.0, 80.0):
        write_outputs([_row(us=us)], folder)
    names = {"rows.csv", "rows.json", "report.md", "report.html"}
    assert {path.name for path in folder.iterdir()} == names
    content = json.loads((folder / "rows.json").read_text())
    assert content["rows"][0]["gpu_us"] == 80.0
    assert content["rows"][0]["graph_us"] is None
    assert "| aten_nhwc |" in (folder / "report.md").read_text()
    for name in names:
        kept = (folder / name).read_text()
        (folder / name).write_text("a user's own notes")
        with pytest.raises(UserError, match=name):
            write_outputs([_row()], folder)
        assert (folder / name).read_text() == "a user's own notes"
        (folder / name).write_text(kept)


MACHINE = {
    "gpu": "nvidia-h200",
    "architecture": "sm_90",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cudnn": "91900",
    "source": gpu_source(),
}
CALL = GpuCall(
    "conv_transpose2d", "nvidia-h200", torch.bfloat16, "", True, ((8, 64, 28, 28),), ((64, 32, 2, 2),),
    ((2, 2), (0, 0), (0, 0), 1, (1, 1), True, False, False, False, None), False,
)  # fmt: skip
TILE = ("conv_transpose2d_forward", "ci64-co32-t4-g1-bfloat16-p13", astuple(Tile(128, 64, 32, 4, 3)))
CHOICE = Choice("triton", {"aten": 60.0, "triton": 50.0}, (TILE,))


def _choices(folder, found=None, machine=MACHINE):
    """A file of choices as a run leaves it; its path."""
    path = folder / "choices" / file_name(machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, [(machine, {CALL: CHOICE} if found is None else found)])
    return path


def _proof(operation="conv_transpose2d_forward", **changes):
    source = source_digest(operation)
    return {"passed": True, "source": source, "triton": "3.6.0", "torch": "2.11.0", "cases": 12} | changes


def _proven(folder, proofs):
    path = folder / "choices" / "proven.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(proofs))
    return path


def _filed(path):
    return {call: choice for _, found in record._checked(path) for call, choice in found.items()}


def test_record_files_what_a_run_brought_back(tmp_path):
    source, root = tmp_path / "run", tmp_path / "tree"
    _rows_file(source, _row(), _row("crf_321_160_3", candidate="pytorch_exact"))
    name = _choices(source).name
    _proven(source, {"nvidia-h200": {"conv_transpose2d_forward.bfloat16": _proof()}})
    (source / "choices" / "proven.lock").write_text("")
    (source / "choices" / ".killed.json").write_text("{")  # what a process left that was ended
    (source / "ceilings.json").write_text(
        json.dumps({"dry_run": False, "gpu": "nvidia-h200", "ceilings": H200})
    )
    measured = root / "segfast" / "measured"
    measured.mkdir(parents=True)
    proven = measured / "proven.json"
    proven.write_text(json.dumps({"nvidia-a100": {"conv2d_forward.float16": _proof("conv2d_forward")}}))
    for _ in range(2):  # a second time changes nothing
        written = record.record(source, root)
        names = sorted(str(path.relative_to(root)) for path in written)
        assert names == [
            "benchmarks/results/nvidia-h200/ceilings.json",
            "benchmarks/results/nvidia-h200/conv_transpose2d.csv",
            "benchmarks/results/nvidia-h200/dense_crf.csv",
            f"segfast/measured/{name}",
            "segfast/measured/proven.json",
        ]
        assert set(json.loads(proven.read_text())) == {"nvidia-a100", "nvidia-h200"}
        assert _filed(measured / name) == {CALL: CHOICE}
        results = root / "benchmarks/results/nvidia-h200/conv_transpose2d.csv"
        assert [row["gpu_us"] for row in rows.read_rows(results)] == [100.0]
    # A later measurement is a row more, not another in its place.
    rows.append_rows(source / "rows.csv", [_row(us=90.0) | {"date": "2026-01-02"}])
    record.record(source, root)
    assert [row["gpu_us"] for row in rows.read_rows(results)] == [100.0, 90.0]


def test_record_merges_choices_and_the_later_ones_prevail(tmp_path):
    root = tmp_path / "tree"
    other = CALL._replace(gradients=True)
    slower = Choice("aten", {"aten": 40.0, "triton": 50.0})
    for i, found in enumerate(({CALL: CHOICE}, {CALL: slower, other: Choice("aten", {})})):
        path = _choices(tmp_path / f"run{i}", found)
        record.record(tmp_path / f"run{i}", root)
    assert _filed(root / "segfast" / "measured" / path.name) == {CALL: slower, other: Choice("aten", {})}


@pytest.fixture
def on_an_h200(monkeypatch):
    """A machine with that GPU and those versions, nothing of it read yet."""
    from segfast.ops import _choice_files, _gpu, _proofs
    from segfast.ops._choice import forget_choices

    def forget():
        forget_choices()
        _gpu.forget()
        _proofs.forget()

    monkeypatch.setattr(_choice_files, "gpu_machine", lambda gpu: MACHINE if gpu == MACHINE["gpu"] else {})
    monkeypatch.setattr(_gpu, "gpu_name", lambda index: MACHINE["gpu"])
    monkeypatch.setattr(_proofs, "gpu_name", lambda index: MACHINE["gpu"])
    monkeypatch.setattr(torch, "cuda", types.SimpleNamespace(current_device=lambda: 0))
    forget()
    yield torch.device("cuda", 0)
    monkeypatch.undo()
    forget()


def test_what_was_filed_is_used_without_measuring(tmp_path, monkeypatch, on_an_h200):
    from segfast.ops import _choice_files, _gpu, _proofs
    from segfast.ops._choice import choices

    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "a user's, empty"))
    run, root = tmp_path / "run", tmp_path / "tree"
    _choices(run)
    import triton

    proof = _proof(triton=triton.__version__)
    _proven(run, {MACHINE["gpu"]: {"conv_transpose2d_forward.bfloat16": proof}})
    assert not _gpu.can_choose(0)
    assert not _proofs.proven("conv_transpose2d_forward", torch.bfloat16, on_an_h200)
    record.record(run, root)
    monkeypatch.setattr(_choice_files, "_BROUGHT", root / "segfast" / "measured")
    _gpu.forget()
    _proofs.forget()
    assert _choice_files.read_gpu(MACHINE["gpu"]) == {CALL: CHOICE}
    assert _gpu.can_choose(0)
    assert choices().find(CALL) == CHOICE
    nearer = CALL._replace(images=((8, 64, 40, 40),))
    assert choices().find(nearer) == CHOICE
    assert choices().find(CALL._replace(images=((8, 64, 280, 280),))) is None
    assert _proofs.proven("conv_transpose2d_forward", torch.bfloat16, on_an_h200)
    assert not _proofs.proven("conv_transpose2d_forward", torch.float16, on_an_h200)


def test_record_keeps_what_somebody_may_read_and_nothing_else(tmp_path, capsys):
    """Other kernels' choices and proofs go; those of other GPUs, and of other versions, stay."""
    source, root = tmp_path / "run", tmp_path / "tree"
    measured = root / "segfast" / "measured"
    kept = [MACHINE | other for other in ({"gpu": "nvidia-a100"}, {"triton": "3.9.0"}, {"torch": "3.0.0"})]
    old = [MACHINE | {"source": "of other kernels"}, kept[0] | {"source": "of other kernels"}]
    for here in (*kept, *old):
        _choices(tmp_path / "before", machine=here)
    (tmp_path / "before" / "choices").rename(tmp_path / "measured")
    root.joinpath("segfast").mkdir(parents=True)
    (tmp_path / "measured").rename(measured)
    proofs = {
        "conv_transpose2d_forward.bfloat16": _proof(triton="2.0.0"),
        "conv_transpose2d_forward.float16": _proof(source="of other kernels"),
        "conv9d_forward.float16": _proof(),
    }
    gone = {"conv_transpose2d_forward.float16": proofs["conv_transpose2d_forward.float16"]}
    (measured / "proven.json").write_text(json.dumps({"nvidia-h200": proofs, "nvidia-a100": gone}))
    here = _choices(source)
    _choices(source, machine=MACHINE | {"source": "of a branch"})
    written = record.record(source, root)
    assert {path.name for path in written} == {here.name, "proven.json"}
    names = {file_name(each) for each in (*kept, MACHINE)}
    assert {path.name for path in measured.iterdir()} == {*names, "proven.json"}
    left = {"nvidia-h200": {"conv_transpose2d_forward.bfloat16": _proof(triton="2.0.0")}}
    assert json.loads((measured / "proven.json").read_text()) == left
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [*["left out"] * 3, *["deleted"] * 2]
    assert "conv9d_forward.float16, conv_transpose2d_forward.float16" in "".join(said)
    assert {path.name for path in record.record(source, root)} == {here.name}


def _edited(path, edit):
    content = json.loads(path.read_text())
    edit(content[0])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "holds none of"),
        (lambda folder: _choices(folder, machine=MACHINE | {"source": "0"}), "kernels in another source"),
        (lambda folder: _rows_file(folder, _row(dry_run=True)), "dry run"),
        (lambda folder: _rows_file(folder, _row(gpu="cpu")), "not on a GPU"),
        (lambda folder: (folder / "rows.csv").write_text("a,b\n"), "expected the columns"),
        (lambda folder: (folder / "ceilings.json").write_text('{"dry_run": true}'), "dry run"),
        (lambda folder: _choices(folder).write_text("{"), "not JSON"),
        (lambda folder: _choices(folder).write_text("{}"), "expected a list"),
        (lambda folder: _choices(folder).write_text("[{}]"), "not a file of choices"),
        (lambda folder: _choices(folder, machine={"cpu": "amd"}), "not on a GPU"),
        (lambda folder: _choices(folder, machine=MACHINE | {"gpu": "fake-sm90"}), "not on a GPU"),
        (lambda folder: _choices(folder).rename(folder / "choices" / "a.json"), "would be looked up as"),
        (
            lambda folder: _choices(folder, {CALL._replace(operation="conv3d"): CHOICE}),
            "unknown operation: conv3d",
        ),
        (
            lambda folder: _choices(folder, {CALL: Choice("triton", {"aten": 1.0})}),
            "is not among what was timed",
        ),
        (lambda folder: _choices(folder, {CALL: Choice("triton", {})}), "was not measured"),
        (lambda folder: _choices(folder, {CALL: Choice("aten", {"aten": 0.0})}), "was not measured"),
        (
            lambda folder: _choices(folder, {CALL: CHOICE._replace(tiles=(("conv9d", *TILE[1:]),))}),
            "tiles of conv9d",
        ),
        (
            lambda folder: _edited(_choices(folder), lambda part: part["choices"][0].pop("us")),
            "KeyError: 'us'",
        ),
        (lambda folder: _proven(folder, {"cpu": {}}), "not on a GPU"),
        (lambda folder: _proven(folder, {"fake-sm90": {}}), "not on a GPU"),
        (
            lambda folder: _proven(folder, {"nvidia-h200": {"conv9d_forward.float16": _proof()}}),
            "is no kernel's",
        ),
        (
            lambda folder: _proven(folder, {"nvidia-h200": {"conv2d_forward.float16": _proof(source="")}}),
            "does not name its source",
        ),
    ],
)
def test_record_refuses(tmp_path, prepare, message, capsys):
    source, root = tmp_path / "run", tmp_path / "tree"
    source.mkdir()
    prepare(source)
    # Nothing of the folder is filed if one file is refused.
    alone = message == "kernels in another source"  # else the rows would be filed
    if any(source.iterdir()) and not (source / "rows.csv").exists() and not alone:
        _rows_file(source, _row())
    with pytest.raises(record.Refused, match=message):
        record.record(source, root)
    assert not root.exists()
    assert record.main([str(source)]) == 2
    assert message in capsys.readouterr().err


def test_make_record_needs_a_folder():
    done = subprocess.run(["make", "-f", "gpu.mk", "record"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: make record FROM=folder" in done.stderr
