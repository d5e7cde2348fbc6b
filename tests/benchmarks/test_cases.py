"""The benchmarks' case list, formulas, gate and peers, without a GPU."""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cudnn_graph, peers, rows, suite, timing
from benchmarks.cases import ALONE, CASES, MODELS, directions, find, headline
from benchmarks.crf_cases import mean_field
from benchmarks.plain_models import plain_model
from benchmarks.trial import Trial
from segfast import _timing
from segfast._timing import interleave, quantiles
from segfast.ops import _cudnn_graph

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
    assert {name for name, *_ in TABLE} <= {case.name for case in CASES if "quick" in case.uses}
    assert {case["gflop"] for case in MODELS} == {301, 363, 337, 751, 108, 54, 285, 162}
    assert {(case["model"], case["h"], case["n"]) for case in MODELS} == {
        (case["model"], case["h"], n) for case in MODELS for n in (1, 8)
    }
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(headline()) == 12
    for case in CASES:
        assert case.cpu().dtype == "float32"
        assert case.cpu()["n"] == 1


def test_convolutions_of_the_networks_are_there_at_both_batches():
    convolutions = [case for case in CASES if case.family == "conv2d" and case.direction == "forward"]
    names = {case.name for case in convolutions}
    for case in convolutions:
        if case["n"] == 8 and case.op == "conv2d" and not case.name.endswith("_layer"):
            one = find(f"{case.name}_n1")
            assert one.params == case.params | {"n": 1}
            assert one.epilogue == case.epilogue and one.small == case.small
    for name in ("aspp_branches_n1_33", "aspp_branches_n8_33", "aspp_branches_n1_65", "aspp_branches_n8_65"):
        assert name in names
        whole, branches = find(name.replace("_branches", "")), find(name)
        assert branches.params == whole.params
        # The projection and the pooled branch aside, which are a small part.
        assert 0.85 < branches.useful_flops / whole.useful_flops < 1
    for name in ("resnet_layer3_d2", "resnet_layer4_d4", "unet_down1_conv2"):
        assert find(f"{name}_n1")["n"] == 1
        assert find(f"{name}_layer").activation is None
    # As torchvision's ResNet has them, with the identity added before the last relu.
    assert find("resnet_layer3_expand").epilogue == ("bn", "add", "relu")


def test_depthwise_layers_come_alone_and_with_what_follows_them():
    for block, layer in ALONE.items():
        block, layer = find(block), find(layer)
        assert block.params == layer.params
        assert block.activation is not None and not {"bn", layer.activation} & set(layer.epilogue)
    depthwise = [c for c in CASES if c.family == "separable_conv2d" and c.op == "conv2d"]
    unpaired = {c.name for c in depthwise} - set(ALONE) - set(ALONE.values())
    # ConvNeXt's is followed by a layer norm; the weight gradient has no block.
    assert {name.partition("_n")[0] for name in unpaired} == {"convnext_dw96_k7", "xception_middle_dw_wgrad"}
    for name in ("xception_middle_dw", "mobilenetv2_dw144", "efficientnet_dw672_k5_layer", "decoder_sep_256"):
        stem, _, alone = name.partition("_layer")
        suffix = "_layer" if name.endswith("_layer") else alone
        assert [find(f"{stem}{n}{suffix}")["n"] for n in ("_n1", "", "_n32")] == [1, 8, 32]


def test_gradients_that_are_measured():
    assert directions(find("unet_up1")) == ("backward", "train")
    assert directions(find("aspp_dw_d12")) == ("grad_input", "grad_weight", "train")
    assert directions(find("xception_middle_dw_layer")) == ("grad_input", "grad_weight", "train")
    assert directions(find("xception_middle_dw")) == ("backward", "train")
    assert directions(find("mobilenetv2_dw96_s2_n1")) == ("train",)
    assert directions(find("resnet_layer3_d2_layer")) == ("grad_input", "grad_weight", "train")
    assert directions(find("resnet_layer3_d2")) == directions(find("aspp_n8_33")) == ("backward", "train")
    assert directions(find("vgg16_conv4_2")) == ("train",)
    assert directions(find("xception_middle_dw_wgrad")) == directions(find("unet_572")) == ()


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
    "case",
    [
        c
        for c in [
            *(case for case in CASES if "quick" in case.uses),
            *map(find, ("mobilenetv2_dw96_s2", "efficientnet_dw144_k5_s2", "resnet_stem", "vgg16_conv6")),
        ]
        if c.op in ("conv2d", "conv_transpose2d")
    ],
    ids=lambda case: case.name,
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


@pytest.mark.parametrize(
    ("name", "size", "gflop"),
    [
        ("unet", 572, 301),
        ("fcn8s_vgg16", 500, 363),
        ("deeplabv3plus_xception65", 513, 108),
        ("deeplabv3plus_mobilenetv2", 513, 54),
        ("deeplabv3_resnet50", 513, 337),
        ("deeplabv3_resnet50", 769, 751),
        ("fcn_resnet50", 513, 285),
        ("segnet_vgg16", 360, 162),
    ],
)
def test_plain_models_have_the_flops_of_the_table(name, size, gflop):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network, channels = plain_model(name)
        with FlopCounterMode(display=False) as counter:
            output = network.eval()(torch.empty(1, channels, size, size))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.005)
    assert output.shape[2:] == ((388, 388) if name == "unet" else (size, size))


def test_unknown_case_lists_the_names():
    with pytest.raises(KeyError, match="unet_up4"):
        find("unet_up5")


def _tiny_case(**changes):
    case = find("unet_up1").cpu()
    return case.replace(params={**case.params, "ci": 4, "co": 3, "h": 5, "w": 6}, **changes)


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight", "backward", "train"])
def test_gate_passes_the_right_and_rejects_the_wrong(direction):
    trial = Trial(_tiny_case(direction=direction), CPU)

    def unwritten(t):
        right = trial.formula(t)
        hole = torch.empty_like(right)
        return torch.cat([right[..., :-1], hole[..., -1:]], -1)

    candidates = [
        timing.Candidate("right", trial.bind(trial.formula)),
        timing.Candidate("wrong", trial.bind(lambda t: 1.01 * trial.formula(t))),
        timing.Candidate("unwritten", trial.bind(unwritten)),
        timing.Candidate("raises", lambda: 1 / 0),
        timing.Skipped("absent", "not installed"),
    ]
    logged = []
    found = timing.measure(
        trial.case, candidates, trial.reference(), trial.sample, CPU, budget_s=0.01, log=logged.append
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


@pytest.mark.parametrize("name", ["resnet_layer3_d2", "xception_middle_dw", "decoder_sep_256"])
def test_gate_of_gradients_behind_a_relu(name):
    """Rounding moves elements across its corner; what is wrong with a kernel is more than that."""
    trial = Trial(find(name).tiny().replace(dtype="bfloat16", direction="train"), CPU)

    def wrong(t):
        return trial.formula({**t, "x": t["x"].roll(1, -1)})

    found = [timing.Candidate(f.__name__, trial.bind(f)) for f in (trial.formula, wrong)]
    right, wrong = suite.measure_trial(trial, found, budget_s=0.0, min_rounds=1, log=lambda text: None)
    assert (right.status, wrong.status) == ("ok", "wrong")


def test_relative_error_never_passes_nan_or_another_shape():
    ones = torch.ones(3)
    assert timing.relative_error(ones, ones.double()) == 0
    assert timing.relative_error(torch.tensor([1.0, math.nan, 1.0]), ones) == math.inf
    assert timing.relative_error(torch.ones(4), ones) == math.inf
    assert timing.relative_error((ones,), (ones, ones)) == math.inf
    assert timing.relative_error(1.5 * ones, ones) == pytest.approx(0.5)


def test_candidates_are_interleaved(monkeypatch):
    order = []
    clock = SimpleNamespace(perf_counter=itertools.count(step=1e-3).__next__)
    monkeypatch.setattr(_timing, "time", clock)
    found = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, budget_s=0.0)
    blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # Blocks of one candidate alternate, and every second round begins with the other one.
    assert len(blocks) >= 5
    assert found["a"].runs == found["b"].runs >= 5
    assert math.isnan(found["a"].gpu_us)
    assert found["a"].wall_p20 <= found["a"].wall_us <= found["a"].wall_p80
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_a_call_that_is_a_block_by_itself_runs_once_a_round(monkeypatch):
    order = []
    clock = SimpleNamespace(perf_counter=itertools.count(step=1.0).__next__)
    monkeypatch.setattr(_timing, "time", clock)
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = interleave(runs, CPU, budget_s=6.0, min_rounds=1)
    assert found["a"].runs == found["b"].runs == 3
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    assert found["a"].wall_us == 1e6


def test_a_far_slower_candidate_is_timed_apart():
    assert timing._paced({"ours": 0.002, "peer": 0.15, "another": 0.019}) == [["ours", "peer", "another"]]
    assert timing._paced({"slow": 0.5, "ours": 0.002, "peer": 0.1}) == [["ours", "peer"], ["slow"]]
    # All of them slow, and none ten times as slow as another: side by side.
    assert timing._paced({"ours": 0.3, "peer": 2.0}) == [["ours", "peer"]]
    assert timing._paced({}) == []


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
        color = (image[:, y, x] - image[:, v, u]).square().sum().item()
        return math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * 5.0**2) - color / (2 * 40.0**2))

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
        tensor.__dlpack__()  # as the package does; refuses what requires a gradient
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
        ("efficientnet_dw144_k5_s2", ["conv_fprop", "mul", "add", "swish"]),
        ("segformer_dw256", ["conv_fprop", "add", "gelu"]),
        ("resnet_layer3_expand", ["conv_fprop", "mul", "add", "add", "relu"]),
        ("decoder_sep_256", 2 * ["conv_fprop", "mul", "add", "relu"]),
        ("mobilenetv2_dw144_projected", ["conv_fprop", "mul", "add", "relu", "conv_fprop", "mul", "add"]),
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
    monkeypatch.setattr(_cudnn_graph, "_PLANS", {})
    monkeypatch.setattr(_cudnn_graph, "_HANDLES", {})
    trial = Trial(find(name).cpu(), CPU)
    output = cudnn_graph.layer(trial)(trial.tensors)
    graph = graphs[0]
    assert [kind for g in graphs for kind, _ in g.nodes] == nodes
    assert len(graphs) == (2 if trial.case.op == "separable_conv2d" else 1)
    assert output.shape == trial.formula(trial.tensors).shape
    geometry = graph.nodes[0][1]
    assert geometry["stride"] == [trial.case["s"]] * 2
    assert geometry["padding"] == [trial.case["p"]] * 2
    if name == "mobilenetv2_dw144":
        assert graph.nodes[-1][1]["upper_clip"] == 6.0


def test_peers_are_the_layer_itself():
    """Every peer that runs here gives the formula's result, the folded batch norm included."""
    names = (
        "resnet_layer3_d2",
        "efficientnet_dw144_k5_s2",
        "segformer_dw256",
        "decoder_sep_256",
        "aspp_n1_33",
        "aspp_branches_n1_33",
        "resnet_layer3_expand",
    )
    for case in (*map(find, names), find("ade20k_upsample_loss")):
        trial = Trial(case.cpu(), CPU)
        reference = trial.reference()
        names = []
        for peer in peers.peers(trial):
            if isinstance(peer, timing.Candidate):
                error = timing.relative_error(trial.sample(peer.run()), reference)
                assert error < 1e-5, (case.name, peer.name)
                names.append(peer.name)
        assert {"aten_nchw", "aten_nhwc"} <= set(names)
        assert ("aten_nhwc_folded" in names) == (case.op == "conv2d" and "bn" in case.epilogue)


@pytest.mark.parametrize("name", ["mobilenetv2_dw144", "decoder_sep_256"])
def test_depthwise_rows_have_both_of_torchs_kernels(monkeypatch, name):
    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    trial = Trial(find(name).tiny().replace(direction="train"), CPU)
    reference, seen = trial.reference(), {}
    formula = trial.formula

    def watched(t):
        output = formula(t)
        # In the backward pass too, in which torch chooses again.
        output.register_hook(lambda grad: seen[peer.name].append(torch.backends.cudnn.depthwise_kernel))
        seen[peer.name] = [torch.backends.cudnn.depthwise_kernel]
        return output

    trial.formula = watched
    for peer in peers.peers(trial):
        assert timing.relative_error(peer.run(), reference) < 1e-5
    assert {"aten_nhwc_native", "aten_nchw_native", "aten_nhwc_cudnn", "aten_nchw_cudnn"} <= set(seen)
    for peer_name, values in seen.items():
        kernels = peer_name.rpartition("_")[2]
        assert values == 2 * [kernels if kernels in ("native", "cudnn") else "auto"], peer_name
    assert torch.backends.cudnn.depthwise_kernel == "auto"


def _kernels(run) -> tuple[list[str], list]:
    """Names of the kernels that a call launches, and their launches."""
    from segfast.kernels import record_launches

    with record_launches() as launches:
        run()
    return [launch.kernel.fn.__name__ for launch, _ in launches], [launch for launch, _ in launches]


FORMS = {
    "segfast_fused": ["_separable_conv2d_fused_kernel"],
    "segfast_two_kernels": ["_depthwise_conv2d_rows_kernel", "_conv2d_dense_kernel"],
}


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", ["forward", "train"])
def test_both_forms_of_a_separable_convolution_are_candidates(direction):
    import segfast
    from benchmarks.ours import ours
    from segfast.kernels import _tiles

    case = find("decoder_sep_256").tiny()
    trial = Trial(case.replace(direction=direction, params={**case.params, "h": 6, "w": 5}), CPU)
    reference = trial.reference()
    with segfast.backend("triton"):
        found = {candidate.name: candidate for candidate in ours(trial)}
        assert list(found) == ["segfast", *FORMS]
        chosen, launches = _kernels(found["segfast"].run)
        for name, first in FORMS.items():
            kernels, forced = _kernels(found[name].run)
            assert kernels[: len(first)] == first
            assert _tiles._overrides == {}
            # No launch is made again, neither the forced form's nor the chosen one's.
            again = _kernels(found[name].run)[1]
            assert all(a is b for a, b in zip(again, forced, strict=True))
        assert _kernels(found["segfast"].run)[0] == chosen
        assert all(a is b for a, b in zip(_kernels(found["segfast"].run)[1], launches, strict=True))
        for candidate in found.values():
            assert timing.relative_error(trial.sample(candidate.run()), reference) < 1e-5, candidate.name


def test_no_form_is_forced_where_aten_serves_the_call():
    from benchmarks.ours import ours

    trial = Trial(find("decoder_sep_256").tiny(), CPU)
    assert [candidate.name for candidate in ours(trial)] == ["segfast"]
