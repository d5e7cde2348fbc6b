"""The benchmark machinery without a GPU: the case list, the gate, the dry run, filing results, the report."""

import csv
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import baselines, cudnn_graph, record, rows, timing
from benchmarks.cases import BLOCKS, CASES, MODELS, OPERATORS, find, headline
from benchmarks.environment import ROOT
from benchmarks.plain_models import plain_model
from benchmarks.problems import Problem, mean_field
from benchmarks.report import html_page, ratio, summary, write_report
from segfast._timing import interleave, quantiles

CPU = torch.device("cpu")
H200 = {"copy_gbs": 4300.0, "bf16_tflops": 790.0, "l2_gbs": 6600.0, "exp2_gops": 3700.0}

# kernels.md section 6: name, GFLOP, least MB, floor in us (arithmetic and memory only) for an H200.
TABLE = [
    ("unet_up1", 52.6, 81, 67),
    ("unet_up2", 45.4, 134, 57),
    ("unet_up3", 41.9, 246, 57),
    ("unet_up4", 40.3, 472, 110),
    ("decoder_up4x4", 68.7, 102, 87),
    ("fcn8s_up8", 17.7, 214, 50),
    ("fcn32s_up32", 14.8, 180, 42),
    ("aspp_n1_33", 32.7, None, 25),
    ("aspp_n8_33", 262, None, 200),
    ("aspp_n8_65", 1014, None, 770),
    ("resnet_layer3_d2", 39.9, 36, 51),
    ("resnet_layer4_d4", 159, 74, 202),
    ("unet_down1_conv2", 190, 663, 241),
    ("xception_middle_dw", 0.44, 98, 23),
    ("mobilenetv2_dw144", 0.35, 77, 18),
    ("aspp_dw_d12", 1.25, 277, 64),
    ("decoder_sep_256", 17.5, 136, 32),
    ("entry_sep_128", 17.3, 271, 63),
    ("middle_sep_728", 35.8, 99, 45),
    ("xception_middle_dw_wgrad", 0.44, 98, 23),
    ("resnet_layer3_d2_wgrad", 39.9, 36, 51),
    ("crf_512_67_3", None, None, 185e3),
    ("crf_321_160_3", None, None, 29e3),
    ("crf_1024x512_80_13", None, None, 742e3),
]


def test_every_row_of_the_tables_is_there():
    assert [case.name for case in OPERATORS] == [name for name, *_ in TABLE]
    assert {case["gflop"] for case in MODELS} == {301, 363, 337, 751, 102, 54}
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(headline()) == 12
    for case in CASES:
        assert case.cpu().dtype == "float32"
        assert case.cpu()["n"] == 1


@pytest.mark.parametrize(("name", "gflop", "least_mb", "floor_us"), TABLE, ids=lambda value: str(value))
def test_counts_agree_with_the_table(name, gflop, least_mb, floor_us):
    case = find(name)
    if gflop is not None:
        assert case.flops / 1e9 == pytest.approx(gflop, rel=0.02)
    if least_mb is not None:
        assert case.min_bytes / 1e6 == pytest.approx(least_mb, rel=0.01)
    # The table counts products with padding except for ASPP, where it says "useful".
    flops = case.useful_flops if case.op == "aspp" else case.flops
    times = flops / 790e12, case.min_bytes / 4.3e12, case.exponentials / 3.7e12
    assert 1e6 * max(times) == pytest.approx(floor_us, rel=0.03)


def test_floor_names_its_ceiling():
    assert rows.floor(find("xception_middle_dw"), H200)[1] == "bytes"
    assert rows.floor(find("crf_321_160_3"), H200)[1] == "exp2"
    # kernels.md's corrections: 163 us of L2 reads at 4x4 stride 2, 71 dilated by 2, 676 for 64 -> 64 at 570.
    for name, l2_us in (("decoder_up4x4", 163), ("resnet_layer3_d2", 71), ("unet_down1_conv2", 676)):
        assert rows.floor(find(name), H200) == (pytest.approx(l2_us, rel=0.05), "l2")
    assert math.isnan(rows.floor(find("unet_up1"), {})[0])


@pytest.mark.parametrize(
    "case", [c for c in OPERATORS if c.op in ("conv2d", "conv_transpose2d")], ids=lambda case: case.name
)
def test_useful_flops_count_the_products_that_are_made(case):
    """Of one channel pair: as many as a convolution of ones with ones sums up."""
    p = {name: case.params.get(name, default) for name, default in (("s", 1), ("p", 0), ("d", 1), ("k", 1))}
    x, weight = torch.ones(1, 1, case["h"], case["w"]), torch.ones(1, 1, p["k"], p["k"])
    if case.op == "conv2d":
        made = torch.nn.functional.conv2d(x, weight, None, p["s"], p["p"], p["d"])
    else:
        made = torch.nn.functional.conv_transpose2d(x, weight, None, p["s"], p["p"])
    pairs = 2 * case["n"] * case["ci"] * case["co"] / case.params.get("g", 1)
    assert case.useful_flops == pytest.approx(pairs * made.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize(("name", "size", "gflop"), [("unet", 572, 301), ("fcn8s_vgg16", 500, 363)])
def test_plain_models_have_the_flops_of_the_table(name, size, gflop):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network, channels = plain_model(name)
        with FlopCounterMode(display=False) as counter:
            output = network.eval()(torch.empty(1, channels, size, size))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.005)
    assert output.shape[2:] == ((388, 388) if name == "unet" else (500, 500))


def test_unknown_case_lists_the_names():
    with pytest.raises(KeyError, match="unet_up4"):
        find("unet_up5")


def _tiny_case(**changes):
    case = find("unet_up1").cpu()
    return case.replace(params={**case.params, "ci": 4, "co": 3, "h": 5, "w": 6}, **changes)


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight", "backward", "train"])
def test_gate_passes_the_right_and_rejects_the_wrong(direction):
    problem = Problem(_tiny_case(direction=direction), CPU)

    def unwritten(t):
        right = problem.formula(t)
        hole = torch.empty_like(right)
        return torch.cat([right[..., :-1], hole[..., -1:]], -1)

    candidates = [
        timing.Candidate("right", problem.bind(problem.formula)),
        timing.Candidate("wrong", problem.bind(lambda t: 1.01 * problem.formula(t))),
        timing.Candidate("unwritten", problem.bind(unwritten)),
        timing.Candidate("raises", lambda: 1 / 0),
        timing.Skipped("absent", "not installed"),
    ]
    logged = []
    found = timing.measure(
        problem.case, candidates, problem.reference(), problem.sample, CPU, budget_s=0.01, log=logged.append
    )
    status = {m.candidate: m.status for m in found}
    assert status["right"] == "ok"
    assert status["wrong"] == "wrong"
    assert status["raises"] == "failed"
    assert status["absent"] == "skipped"
    if direction == "forward":
        assert status["unwritten"] == "wrong"
    assert [m.candidate for m in found if m.timing is not None] == [
        m.candidate for m in found if m.status == "ok"
    ]
    assert any("ZeroDivisionError" in text for text in logged)


def test_relative_error_never_passes_nan_or_another_shape():
    ones = torch.ones(3)
    assert timing.relative_error(ones, ones.double()) == 0
    assert timing.relative_error(torch.tensor([1.0, math.nan, 1.0]), ones) == math.inf
    assert timing.relative_error(torch.ones(4), ones) == math.inf
    assert timing.relative_error((ones,), (ones, ones)) == math.inf
    assert timing.relative_error(1.5 * ones, ones) == pytest.approx(0.5)


def test_candidates_are_interleaved():
    order = []
    found = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, budget_s=0.0)
    blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # Blocks of one candidate alternate, and every second round begins with the other one.
    assert len(blocks) >= 5
    assert found["a"].runs == found["b"].runs >= 5
    assert math.isnan(found["a"].gpu_us)
    assert found["a"].wall_p20 <= found["a"].wall_us <= found["a"].wall_p80
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_mean_field_is_the_sum_over_all_pairs():
    """Against the definition, pixel by pixel."""
    torch.manual_seed(0)
    unary, image = torch.rand(3, 3, 4).double(), (255 * torch.rand(3, 3, 4)).double()
    parameters = {"bilateral": (5.0, 40.0, 2.0), "spatial": (2.0, 1.5)}
    points = [(y, x) for y in range(3) for x in range(4)]

    def kernel(i, j, kind):
        (y, x), (v, u) = points[i], points[j]
        if kind == "spatial":
            return math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * 2.0**2))
        colour = (image[:, y, x] - image[:, v, u]).square().sum().item()
        return math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * 5.0**2) - colour / (2 * 40.0**2))

    q = torch.softmax(-unary.flatten(1), 0)
    message = torch.zeros_like(q)
    for kind, weight in (("bilateral", 2.0), ("spatial", 1.5)):
        k = torch.tensor([[kernel(i, j, kind) for j in range(12)] for i in range(12)]).double()
        scale = k.sum(1).rsqrt()
        message += weight * (q * scale) @ k * scale
    expected = torch.softmax(message - unary.flatten(1), 0).reshape(3, 3, 4)
    torch.testing.assert_close(mean_field(unary, image, iterations=1, **parameters), expected)


class _FakeTensor:
    """A node's result: a key of the table of pointers."""

    def set_output(self, flag):
        return self

    set_dim = set_stride = set_output


class _FakeGraph:
    """Stands for cudnn.pygraph: keeps the nodes."""

    def __init__(self, **options):
        self.options, self.nodes = options, []

    def tensor_like(self, tensor):
        assert isinstance(tensor, torch.Tensor)
        return _FakeTensor()

    def _node(self, kind, **inputs):
        self.nodes.append((kind, inputs))
        edges = [
            inputs[name]
            for name in ("image", "weight", "loss", "filter", "a", "b", "input")
            if name in inputs
        ]
        assert edges and all(isinstance(edge, _FakeTensor) for edge in edges)
        return _FakeTensor()

    def __getattr__(self, name):
        return lambda **inputs: self._node(name, **inputs)

    def build(self, modes):
        self.built = modes

    def get_workspace_size(self):
        return 0

    def execute(self, pointers, workspace, handle):
        assert all(isinstance(value, torch.Tensor) for value in pointers.values())


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("resnet_layer3_d2", ["conv_fprop", "mul", "add", "relu"]),
        ("mobilenetv2_dw144", ["conv_fprop", "mul", "add", "relu"]),
        ("unet_up1", ["conv_dgrad", "add"]),
        ("fcn8s_up8", ["conv_dgrad"]),
    ],
)
def test_cudnn_graph_says_what_the_layer_is(monkeypatch, name, nodes):
    graphs = []
    fake = SimpleNamespace(
        data_type=SimpleNamespace(BFLOAT16=1, HALF=2, FLOAT=3),
        heur_mode=SimpleNamespace(A=1, FALLBACK=2),
        create_handle=lambda: 7,
        set_stream=lambda handle, stream: None,
        pygraph=lambda **options: graphs.append(_FakeGraph(**options)) or graphs[-1],
    )
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    problem = Problem(find(name).cpu(), CPU)
    output = cudnn_graph.convolution(problem)(problem.tensors)
    graph = graphs[0]
    assert [kind for kind, _ in graph.nodes] == nodes
    assert output.shape == problem.formula(problem.tensors).shape
    geometry = graph.nodes[0][1]
    assert geometry["stride"] == [problem.case["s"]] * 2
    assert geometry["padding"] == [problem.case["p"]] * 2
    if name == "mobilenetv2_dw144":
        assert graph.nodes[-1][1]["upper_clip"] == 6.0


def test_peers_are_the_layer_itself():
    """Every peer that runs here gives the formula's result, the folded batch norm included."""
    for case in (find("resnet_layer3_d2"), find("decoder_sep_256"), find("aspp_n1_33"), BLOCKS[-1]):
        problem = Problem(case.cpu(), CPU)
        reference = problem.reference()
        names = []
        for peer in baselines.peers(problem):
            if isinstance(peer, timing.Candidate):
                error = timing.relative_error(problem.sample(peer.run()), reference)
                assert error < 1e-5, (case.name, peer.name)
                names.append(peer.name)
        assert {"aten_nchw", "aten_nhwc"} <= set(names)
        assert ("aten_nhwc_folded" in names) == (case.name == "resnet_layer3_d2")


def _row(
    case="unet_up1", candidate="aten_nhwc", us=100.0, ours=False, status="ok", gpu="nvidia-h200", **more
):
    timed = timing.Timing(us, us - 1, us + 1, us + 5, us, us + 9, 20)
    measured = timing.Measurement(candidate, ours, status, "", 1e-3, timed if status == "ok" else None)
    columns = dict.fromkeys(rows.VERSIONS, "") | {"gpu": gpu, "commit": "abc", "date": "2026-01-01"}
    return rows.make_row("T2", find(case), measured, H200, columns, more.get("dry_run", False))


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


def _configs(gpu="nvidia-h200", **config):
    tile = {"block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3, "split_k": 1}
    row = {"config": tile | config, "us": 50.0, "aten_us": 60.0}
    operations = {"conv_transpose2d_forward": {"ci8-co8-t4-g1-bfloat16-p3": row}}
    return {"gpu": gpu, "architecture": "sm_90", "operations": operations}


def test_record_files_what_a_run_brought_back(tmp_path):
    source, root = tmp_path / "run", tmp_path / "tree"
    _rows_file(source, _row(), _row("crf_321_160_3", candidate="pytorch_exact"))
    (source / "configs.json").write_text(json.dumps(_configs()))
    proof = {"source": "0123", "gpu": "nvidia-h200"}
    (source / "proven.json").write_text(json.dumps({"sm_90": {"conv_transpose2d_forward.bfloat16": proof}}))
    (source / "ceilings.json").write_text(
        json.dumps({"dry_run": False, "gpu": "nvidia-h200", "ceilings": H200})
    )
    proven = root / "kernels" / "configs" / "proven.json"
    proven.parent.mkdir(parents=True)
    proven.write_text(json.dumps({"sm_80": {"conv_transpose2d_forward.float16": proof}}))
    for _ in range(2):  # a second time changes nothing
        written = record.record(source, root)
        names = sorted(str(path.relative_to(root)) for path in written)
        assert names == [
            "benchmarks/results/nvidia-h200/ceilings.json",
            "benchmarks/results/nvidia-h200/conv_transpose2d.csv",
            "benchmarks/results/nvidia-h200/dense_crf.csv",
            "kernels/configs/nvidia-h200.json",
            "kernels/configs/proven.json",
        ]
        assert set(json.loads(proven.read_text())) == {"sm_80", "sm_90"}
        assert json.loads((root / "kernels/configs/nvidia-h200.json").read_text()) == _configs()
        results = root / "benchmarks/results/nvidia-h200/conv_transpose2d.csv"
        assert [row["gpu_us"] for row in rows.read_rows(results)] == [100.0]
    # A later measurement is a row more, not another in its place.
    rows.append_rows(source / "rows.csv", [_row(us=90.0) | {"date": "2026-01-02"}])
    record.record(source, root)
    assert [row["gpu_us"] for row in rows.read_rows(results)] == [100.0, 90.0]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "holds none of"),
        (lambda folder: _rows_file(folder, _row(dry_run=True)), "dry run"),
        (lambda folder: _rows_file(folder, _row(gpu="cpu")), "not on a GPU"),
        (lambda folder: (folder / "rows.csv").write_text("a,b\n"), "expected the columns"),
        (lambda folder: (folder / "configs.json").write_text("{"), "not JSON"),
        (
            lambda folder: (folder / "configs.json").write_text(json.dumps(_configs(gpu="cpu"))),
            "not on a GPU",
        ),
        (
            lambda folder: (folder / "configs.json").write_text(json.dumps(_configs(tile=3))),
            "not a measured",
        ),
        (lambda folder: (folder / "proven.json").write_text('{"cpu": {}}'), "no GPU's architecture"),
        (lambda folder: (folder / "ceilings.json").write_text('{"dry_run": true}'), "dry run"),
    ],
)
def test_record_refuses(tmp_path, prepare, message, capsys):
    source, root = tmp_path / "run", tmp_path / "tree"
    source.mkdir()
    # Nothing of the folder is filed if one file is refused.
    if prepare(source) is not None and not (source / "rows.csv").exists():
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


def _run_gpu(folder, *arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SEGFAST", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    done = _run_gpu(folder, "--tier", "T0", "full", "T1", "T2", "T3", "T4", SEGFAST_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-2000:] + (folder / "gpu.log").read_text()[-4000:]
    return folder, done.stdout


def test_dry_run_walks_all_tiers(dry_run):
    folder, printed = dry_run
    names = {"gpu.log", "rows.csv", "ceilings.json", "configs.json", "proven.json", "report.html"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.stat().st_size < 16e6 for path in folder.iterdir())
    found = rows.read_rows(folder / "rows.csv")
    assert {row["tier"] for row in found} == {"T1", "T2", "T3", "T4"}
    assert all(row["dry_run"] for row in found)
    assert not [row for row in found if row["status"] in ("failed", "wrong")]
    assert {row["case"] for row in found if row["tier"] == "T1"} == {case.name for case in CASES}
    assert {row["direction"] for row in found if row["tier"] == "T3"} == {"backward", "train"}
    assert printed.rstrip().endswith("no GPU figure was taken.")
    assert "2 of 2 checks passed" in printed
    log = (folder / "gpu.log").read_text()
    assert "Traceback" not in log
    assert "WRONG" not in log
    assert json.loads((folder / "proven.json").read_text())["cpu"]
    assert json.loads((folder / "configs.json").read_text())["operations"]


def test_dry_run_cannot_be_filed(dry_run):
    with pytest.raises(record.Refused, match="dry run"):
        record.record(dry_run[0], ROOT / "out" / "nowhere")


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A worker of a dry run in this process."""
    import segfast
    from benchmarks.tiers import Session

    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    threads = torch.get_num_threads()

    def start(tier, *names, **options):
        return Session(tier, tmp_path, 60.0, None, names, **options)

    with segfast.backend("auto"):
        yield start
    torch.set_num_threads(threads)


def _cells(folder, *names):
    with (folder / "rows.csv").open() as file:
        return {tuple(row[name] for name in names) for row in csv.DictReader(file)}


def test_bench_tier_takes_every_direction(session, tmp_path):
    from benchmarks.tiers import run_tier

    run_tier(session("bench", "unet_up3", "unet_up3_concat"))
    assert _cells(tmp_path, "case", "direction", "candidate") == {
        (case, direction, candidate)
        for case in ("unet_up3", "unet_up3_concat")
        for direction in ("forward", "backward", "train")
        for candidate in ("aten_nchw", "aten_nhwc", "segfast")
    }


def test_last_tier_takes_models_and_their_training(session, tmp_path):
    from benchmarks.tiers import run_tier

    run_tier(session("T5", "unet_572", "unet_up3"))
    assert _cells(tmp_path, "case", "direction", "candidate") == {
        ("unet_572", "forward", "eager_nhwc"),
        ("unet_572", "forward", "segfast"),
        ("unet_572", "train", "eager_nhwc"),
        ("unet_572", "train", "segfast"),
        *(("unet_up3", "forward", name) for name in ("aten_nchw", "aten_nhwc", "segfast")),
    }
    assert _cells(tmp_path, "status") == {("ok",)}


def test_a_worker_that_takes_over_skips_what_was_begun(session, tmp_path):
    from benchmarks.tiers import run_tier

    begun = frozenset({f"T1 {find('unet_up3').tiny().key}"})
    run_tier(session("T1", "unet_up3", "unet_up4", begun=begun))
    assert _cells(tmp_path, "case") == {("unet_up4",)}


def test_a_failing_case_does_not_stop_the_tier(session, tmp_path, monkeypatch):
    from benchmarks import suite
    from benchmarks.tiers import run_tier

    make = suite.make_problem

    def failing(case, device):
        if case.name == "unet_up3":
            raise RuntimeError("planted")
        return make(case, device)

    monkeypatch.setattr("benchmarks.tiers.make_problem", failing)
    run_tier(session("T1", "unet_up3", "unet_up4"))
    found = rows.read_rows(tmp_path / "rows.csv")
    assert [(row["status"], row["note"]) for row in found if row["case"] == "unet_up3"] == [
        ("failed", "RuntimeError: planted")
    ]
    assert {row["status"] for row in found if row["case"] == "unet_up4"} == {"ok"}


def test_a_dead_worker_costs_one_case(tmp_path, monkeypatch):
    """A process that dies in a case leaves a row that says so; the next one takes up after it."""
    from benchmarks import gpu

    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, os\n"
        "begun = sys.argv[sys.argv.index('--begun') + 1 :] if '--begun' in sys.argv else []\n"
        "for name in ('T1 a/bfloat16/forward/full', 'T1 b/bfloat16/forward/full'):\n"
        "    if name in begun: continue\n"
        "    print('begin ' + name, flush=True)\n"
        "    if '/a/' in name.replace(' ', '/'): os.kill(os.getpid(), 11)\n"
    )
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(interpreter))
    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    assert gpu.main(["--tier", "T1", "--out", str(tmp_path / "out")]) == 0
    found = rows.read_rows(tmp_path / "out" / "rows.csv")
    assert [(row["case"], row["status"]) for row in found] == [("a", "failed")]
    assert "-11" in found[0]["note"]
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert log.count("begin T1 a") == log.count("begin T1 b") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = _run_gpu(tmp_path / "out", "--tier", "T1")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_peers_need_no_kernel_of_ours(tmp_path):
    """The first tier runs where segfast's kernels cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from pathlib import Path\n"
        "from benchmarks.tiers import Session, run_tier\n"
        f"run_tier(Session('T1', Path({str(tmp_path)!r}), 60.0, None, ['unet_up3', 'resnet_layer3_d2']))\n"
    )
    environment = dict(os.environ, SEGFAST_DRY_RUN="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {row["case"] for row in rows.read_rows(tmp_path / "rows.csv")} == {"unet_up3", "resnet_layer3_d2"}


def test_tune_without_a_gpu_says_so(capsys, monkeypatch):
    from segfast.cli import main

    if torch.cuda.is_available():
        pytest.skip("there is a GPU to tune on")
    monkeypatch.delenv("SEGFAST_DRY_RUN", raising=False)
    assert main(["tune"]) == 2
    assert "no" in capsys.readouterr().err
    assert main(["tune", "--shape", "1,2,3"]) == 2
    assert "N,C_IN,C_OUT" in capsys.readouterr().err
    assert main(["tune", "--budget", "0"]) == 2


def test_tune_dry_run_keeps_the_fastest(tmp_path):
    """Through the interpreter: every configuration is checked and timed, the table has a row an operation."""
    environment = dict(
        os.environ, SEGFAST_DRY_RUN="1", TRITON_INTERPRET="1", SEGFAST_CACHE=str(tmp_path / "cache")
    )
    command = [sys.executable, "-m", "segfast", "tune", "--dtype", "float32", "--budget", "5"]
    command += ["--shape", "1,4,4,2,2,2,2,0", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "cpu.json").read_text())
    assert set(table["operations"]) == {
        f"conv_transpose2d_{direction}" for direction in ("forward", "grad_input", "grad_weight")
    }
    for buckets in table["operations"].values():
        for row in buckets.values():
            assert row["us"] > 0
            assert row["aten_us"] > 0
    assert not (tmp_path / "cache").exists()
