"""`segfast tune`: what is timed, and where the tables keep it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import segfast
from benchmarks import tuning
from benchmarks.cases import BLOCKS, CONVOLUTIONS, CRFS, HEADS, LAYERS, OPERATORS, find
from benchmarks.environment import ROOT
from segfast import _tune, _tune_calls
from segfast._tune import Tuned, Tuner, Variant, merge_table, variants, work
from segfast._tune_calls import FAMILIES, is_gradient
from segfast._tune_layers import Head, Image, Layer, Pyramid
from segfast.cli import main
from segfast.kernels import Config, _configs, _device
from segfast.ops import _backend, _cudnn
from segfast.ops._conv2d_aten import conv2d_aten
from segfast.ops.dilated_conv2d import functional as conv_functional
from segfast.ops.segmentation_head import functional as head_functional
from segfast.ops.separable_conv2d import functional

CPU = torch.device("cpu")
GRADIENTS = ("grad_input", "grad_weight")
# One that walks along rows, and one that goes tap by tap.
WALKS, TAPS = Layer(1, 4, 8, 3, 3, 3, 1, 1), Layer(1, 4, 8, 5, 5, 2, 3, 0)
UP = Layer(1, 4, 4, 2, 2, 2, 2, 0)
HEAD = Head(2, 5, 3, 3, 2)
# Of several channels, so that ATen's result is channels_last as well.
BARE, PYRAMID = Layer(1, 4, 8, 5, 5, 3, 1, 2, 2), Pyramid(1, 16, 8, 4, 4, 1)
IMAGE = Image(2, 3, 6, 5)
# Ours calls a launcher there, which ATen does not stand in for; the dry run holds it to ATen.
LAUNCHERS = ["pointwise_conv2d_forward"]
LAUNCHERS += ["upsample_softmax_forward", "upsample_dice_sums", "softmax_expectation"]
LAUNCHERS += FAMILIES["dense_crf"].operations


def test_tune_without_a_gpu_says_so(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to tune on")
    monkeypatch.delenv("SEGFAST_DRY_RUN", raising=False)
    assert main(["tune"]) == 2
    assert "no" in capsys.readouterr().err
    assert main(["tune", "--budget", "0"]) == 2
    assert main(["tune", "--shape", "1,4,4,2,2,2,2,0"]) == 2
    assert "--family" in capsys.readouterr().err
    for shape in ("1,2,3", "1,4,4,2,2,2,2,-1", "1,4,4,2,2,2,2,0,0", "a"):
        assert main(["tune", "--family", "conv_transpose2d", "--shape", shape]) == 2
        assert "N,C_IN,C_OUT" in capsys.readouterr().err
    for shape in ("1,4,4,2", "1,0,4,4,2", "1,4,4,2,2,2,2,0"):
        assert main(["tune", "--family", "segmentation_head", "--shape", shape]) == 2
        assert "N,CLASSES,H,W,SCALE" in capsys.readouterr().err
    assert main(["tune", "--family", "dense_crf", "--shape", "1,21,32"]) == 2
    assert "N,LABELS,H,W" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """What a dry run keeps, by family: through the interpreter, every configuration checked and timed."""
    folder = tmp_path_factory.mktemp("tune")
    variables = {"SEGFAST_DRY_RUN": "1", "TRITON_INTERPRET": "1", "SEGFAST_CACHE": str(folder / "cache")}
    found = {}
    layers_of = {"conv_transpose2d": [UP], "separable_conv2d": [WALKS, TAPS], "segmentation_head": [HEAD]}
    layers_of["dense_crf"] = [IMAGE]
    layers_of["dilated_conv2d"] = [BARE, BARE._replace(fused=1), PYRAMID]
    for name, layers in layers_of.items():
        shapes = [argument for layer in layers for argument in ("--shape", ",".join(map(str, layer)))]
        command = [sys.executable, "-m", "segfast", "tune", "--dtype", "float32", "--budget", "inf"]
        command += ["--family", name, *shapes, "--out", str(folder / name)]
        environment = os.environ | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "differs" not in done.stdout
        found[name] = json.loads((folder / name / "cpu.json").read_text())["operations"]
    assert not (folder / "cache").exists()
    return found


def test_tune_dry_run_keeps_the_fastest_of_each_operation(tables):
    for name, operations in tables.items():
        assert set(operations) >= set(FAMILIES[name].operations)
        for buckets in operations.values():
            for row in buckets.values():
                assert row["us"] > 0
                assert row["aten_us"] > 0
    assert len(tables["dilated_conv2d"]["conv2d_forward"]) == 2
    separable = tables["separable_conv2d"]["separable_conv2d_forward"]
    assert {row["config"]["form"] for row in separable.values()} <= {"fused", "two kernels"}


@pytest.fixture
def on_a_gpu(tables, monkeypatch):
    """The choice of backend on a GPU where all is proven, with this table only, ours twice as fast."""
    fast = {
        operation: {key: row | {"us": 1.0, "aten_us": 2.0} for key, row in rows.items()}
        for family in ("separable_conv2d", "segmentation_head", "dilated_conv2d")
        for operation, rows in tables[family].items()
    }
    proven = frozenset(f"{operation}.float32" for operation in _configs.operations())
    monkeypatch.setattr(_configs, "tables", lambda slug, arch: [{"operations": fast}])
    monkeypatch.setattr(_configs, "proven_entries", lambda arch: proven)
    monkeypatch.setattr(_device, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_device, "gpu_slug", lambda device: "gpu")
    for family in (functional, head_functional, conv_functional):
        monkeypatch.setattr(family, "kernel_reason_not", lambda *args: None)
    _backend._look_up.cache_clear()
    yield fast
    _backend._look_up.cache_clear()


@pytest.mark.parametrize("differentiates", [False, True])
@pytest.mark.parametrize("layer", [WALKS, TAPS], ids=["walks", "taps"])
def test_what_was_tuned_is_found_for_that_layer(on_a_gpu, layer, differentiates):
    x = torch.empty(layer.batch, layer.c_in, layer.height, layer.width).to(memory_format=torch.channels_last)
    weight = torch.empty(layer.c_in, 1, layer.kernel, layer.kernel)
    geometry, other = ((2 * (stride,), 2 * (layer.dilation,)) for stride in (layer.stride, layer.stride + 1))
    ask = functional.can_use_triton
    for pointwise in (None, torch.empty(layer.c_out, layer.c_in, 1, 1)):
        assert ask("auto", x, weight, pointwise, None, geometry, differentiates) is None
        assert "not measured" in ask("auto", x, weight, pointwise, None, other, differentiates)
    on_a_gpu["depthwise_conv2d_forward"].clear()
    _backend._look_up.cache_clear()
    assert "not measured" in ask("auto", x, weight, None, None, geometry, differentiates)


def test_what_was_tuned_is_found_for_that_head(on_a_gpu):
    logits = torch.empty(HEAD.batch, HEAD.classes, HEAD.height, HEAD.width)
    operations, ask = head_functional.OPERATIONS, head_functional.can_use_triton
    size, larger = HEAD.output_size()[1:], (64, 64)
    for operation in operations:
        assert ask("auto", logits, size, (operation,)) is None
        assert "not measured" in ask("auto", logits, larger, (operation,))
        assert "not measured" in ask("auto", logits[:, :4], size, (operation,))
    assert ask("auto", logits, size, operations) is None
    for row in on_a_gpu["upsample_grad_logits"].values():
        row["us"] = 100.0
    _backend._look_up.cache_clear()
    assert "ATen was measured faster" in ask("auto", logits, size, operations)
    assert ask("auto", logits, size, operations[:1]) is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("differentiates", [False, True])
def test_what_was_tuned_is_found_for_that_convolution(on_a_gpu, fused, differentiates):
    """Gradients too, which another family's kernel may compute, under buckets of its own."""
    x = torch.empty(BARE.batch, BARE.c_in, BARE.height, BARE.width).to(memory_format=torch.channels_last)
    weight = torch.empty(BARE.c_out, BARE.c_in, BARE.kernel, BARE.kernel)

    def ask(dilation):
        geometry = ((BARE.stride,) * 2, (dilation,) * 2)
        return conv_functional.can_use_triton(
            "auto", x, weight, None, geometry, 1, fused, differentiates=differentiates
        )

    assert ask(BARE.dilation) is None
    assert "not measured" in ask(BARE.dilation + 1)
    on_a_gpu["conv2d_grad_input"].clear()
    _backend._look_up.cache_clear()
    assert (ask(BARE.dilation) is None) == (not differentiates)


def test_what_was_tuned_is_found_for_that_pyramid(on_a_gpu):
    x = torch.empty(1, PYRAMID.c_in, 4, 4).to(memory_format=torch.channels_last)
    weight = torch.empty(PYRAMID.c_out, PYRAMID.c_in, 3, 3)
    ask = conv_functional.can_use_triton
    for rate, found in ((3 * PYRAMID.rate, True), (2, False)):
        geometry = ((1, 1), (rate, rate))
        reason = ask("auto", x, weight, None, geometry, 1, True, differentiates=False, branches=4)
        assert (reason is None) == found


def test_a_kernel_tuned_for_another_family_does_not_decide_its_own(tmp_path):
    """Its tiles are used, but no row of its own is written over, and none stands in for one."""
    own = Tuned("up", "up", "ci1-p4", Config(16, 16, 16, 4, 2), 3.0, 5.0, [])
    lent = Tuned("conv", "up", "ci1-p4", Config(32, 16, 16, 4, 2), 7.0, 9.0, [], {"rival": 8.0}, "ci2-p4")
    for first, second in ((own, lent), (lent, own)):
        path = tmp_path / f"{first.operation}.json"
        for tuned in (first, second):
            merge_table(path, [tuned], CPU)
        operations = json.loads(path.read_text())["operations"]
        assert operations["up"] == {"ci1-p4": _configs.config_row(own.config, 3.0, 5.0)}
        assert operations["conv"] == {"ci2-p4": _configs.config_row(lent.config, 7.0, 9.0, rival=8.0)}
    path = tmp_path / "alone.json"
    merge_table(path, [lent], CPU)
    (row,) = json.loads(path.read_text())["operations"]["up"].values()
    assert row["timed_as"] == "conv"
    assert row["config"]["block_m"] == 32


@pytest.mark.parametrize("fused", [0, 1])
def test_cudnns_fused_calls_are_timed_where_they_are_right(monkeypatch, fused):
    """And their times kept in the row, which is what the choice of backend reads."""
    layer, seen = BARE._replace(fused=fused), []

    def rival(*operands):
        seen.append(operands)
        return conv2d_aten(*operands, 0.01)

    monkeypatch.setattr(_cudnn, "_has_cudnn", lambda input: True)
    monkeypatch.setattr(_cudnn._cudnn_graph, "installed", lambda: True)
    monkeypatch.setitem(_cudnn.RUN, "cudnn_relu", rival)
    monkeypatch.setitem(_cudnn.RUN, "cudnn_graph", lambda *operands: rival(*operands) + 1)
    config, logged = Config(16, 16, 16, 4, 2), []
    tuner = Tuner(torch.bfloat16, CPU, logged.append)
    family = FAMILIES["dilated_conv2d"]
    calls = tuner.calls(family, "conv2d_forward", layer)
    assert list(calls.rivals) == (["cudnn_relu", "cudnn_graph"] if fused else ["cudnn_graph"])
    variant = Variant("conv2d_forward", calls.bucket, config, [], calls.aten())
    monkeypatch.setattr(_tune, "variants", lambda *args: [variant])
    tuned = tuner.tune(family, "conv2d_forward", layer, 0.0)
    assert list(tuned.rivals) == (["cudnn_relu"] if fused else [])
    assert [line for line in logged if "cudnn_graph: differs" in line]
    assert all(time > 0 for time in tuned.rivals.values()) and {name for name, _ in tuned.rows} == {
        str(config), "aten", *tuned.rivals
    }  # fmt: skip
    weight, scale, activation = (seen[0][i] for i in (1, 7, -1))
    assert weight.shape == (layer.c_out, layer.c_in, 3, 3)
    assert (scale is not None) == bool(fused) and activation == ("relu" if fused else None)
    assert tuned.asked == f"ci4-co8-t9-g1-s1d2{'-fused' if fused else ''}-bfloat16-p4"


@pytest.mark.parametrize("name", FAMILIES)
def test_both_calls_of_an_operation_are_the_same_layer(name):
    """On ATen they are: the geometry, the operands, the direction."""
    tuner = Tuner(torch.float64, CPU)
    for family, operation, layer in work({name: FAMILIES[name].layers[:1] + FAMILIES[name].layers[-4:]}):
        if operation in LAUNCHERS:
            continue
        sizes = {"batch": 1, "c_in": 6, "c_out": 5, "classes": 5, "height": 9, "width": 8}
        small = {
            name: min(size, getattr(layer, name)) for name, size in sizes.items() if hasattr(layer, name)
        }
        calls = tuner.calls(family, operation, layer._replace(**small))
        torch.testing.assert_close(calls.ours(), calls.aten())


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_neither_side_of_a_depthwise_call_copies_its_filters(direction, monkeypatch):
    seen = {}

    def note(name, function):
        def noted(x, weight, *rest):
            seen[name] = weight
            return function(x, weight, *rest)

        return noted

    monkeypatch.setattr(_tune_calls.F, "conv2d", note("aten", torch.conv2d))
    monkeypatch.setattr("segfast.functional.depthwise_conv2d", note("ours", torch_depthwise))
    tuner = Tuner(torch.float64, CPU)
    calls = tuner.calls(FAMILIES["separable_conv2d"], f"depthwise_conv2d_{direction}", WALKS)
    torch.testing.assert_close(calls.ours(), calls.aten())
    assert seen["aten"].is_contiguous()
    assert seen["ours"].stride(0) == 1
    assert torch.equal(seen["aten"], seen["ours"])


def torch_depthwise(x, weight, bias, stride, padding, dilation):
    return torch.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])


def test_work_holds_each_operation_of_each_layer_once():
    up, separable, convolutions, heads, images = (len(family.layers) for family in FAMILIES.values())
    todo = work({name: family.layers for name, family in FAMILIES.items()})
    pyramids = [layer for layer in FAMILIES["dilated_conv2d"].layers if isinstance(layer, Pyramid)]
    convolutions -= len(pyramids)
    # A gradient is the same whether an epilogue followed or not, and half of the layers have one.
    assert len(todo) == 3 * up + 5 * separable + 2 * convolutions + len(pyramids) + 5 * heads + 4 * images
    names = [operation for _, operation, _ in todo]
    assert names == sorted(names, key=is_gradient)
    assert {name for name in names if is_gradient(name)} == {
        *(
            f"{kind}_{side}"
            for kind in ("conv_transpose2d", "depthwise_conv2d", "conv2d")
            for side in GRADIENTS
        ),
        *("upsample_grad_logits", "softmax_expectation"),
    }
    assert names.index("depthwise_conv2d_forward") < names.index("separable_conv2d_forward")
    alike = work({"separable_conv2d": [WALKS, WALKS._replace(c_out=24)]})
    assert [operation for _, operation, _ in alike].count("depthwise_conv2d_forward") == 1
    assert [operation for _, operation, _ in alike].count("separable_conv2d_forward") == 2


def test_the_gpu_run_tunes_what_the_cases_need():
    todo = tuning.work(OPERATORS + BLOCKS + HEADS + LAYERS + CONVOLUTIONS + CRFS)
    keys = [(item.operation, item.family.layer_of(item.operation, item.layer)) for item in todo]
    assert len(set(keys)) == len(keys)
    assert len({item.case.key for item in todo}) == len(todo)
    for item in todo:
        if isinstance(item.layer, Layer):
            assert item.operation.endswith(item.case.direction)
        else:
            assert (item.case.direction == "backward") == is_gradient(item.operation)
        fused = isinstance(item.layer, Pyramid) or (isinstance(item.layer, Layer) and item.layer.fused == 1)
        assert item.case.epilogue == (("bn", "relu") if fused else ())
    found = {(item.operation, item.case.name) for item in todo}
    for operation in FAMILIES["separable_conv2d"].operations:
        kind = operation.partition("_")[0]
        assert (operation, f"decoder_sep_256_{'bare' if kind == 'separable' else kind}") in found
    pointwise = next(item.case for item in todo if item.case.name == "decoder_sep_256_pointwise")
    assert (pointwise["k"], pointwise["g"], pointwise["co"], pointwise["h"]) == (1, 1, 256, 129)
    for name, *endings in (
        ("conv2d_forward", "fused", "bare"),
        ("conv2d_grad_input", "bare"),
        ("conv2d_grad_weight", "bare"),
    ):
        assert {(name, f"resnet_layer4_d4{n}_{end}") for n in ("", "_n1") for end in endings} <= found
    pyramids = {item.layer for item in todo if item.operation == "parallel_conv2d_forward"}
    assert pyramids == {Pyramid(n, 2048, 256, s, s, rate) for n in (1, 8) for s, rate in ((33, 6), (65, 12))}
    for operation in FAMILIES["segmentation_head"].operations:
        layers = {item.layer for item in todo if item.operation == operation}
        assert layers == {
            *(Head(16, 150, 128, 128, 4), Head(4, 150, 16, 16, 32)),
            *(Head(batch, 19, 128, 256, 8) for batch in (1, 8)),
            *(Head(batch, 21, 64, 64, 8) for batch in (1, 8)),
        }
    images = {Image(1, 21, *size) for size in ((321, 321), (512, 512), (512, 1024))}
    images |= {Image(1, labels, 512, 512) for labels in (2, 150)} | {Image(16, 21, n, n) for n in (321, 512)}
    for operation in FAMILIES["dense_crf"].operations:
        layers = {item.layer for item in todo if item.operation == operation}
        few = [image for image in images if image.batch == 1 and image.width <= 512]
        assert layers == (set(few) if operation == "gaussian_filter" else images)
    # A table holds for up to four times the pixels.
    assert {item.layer.batch for item in todo} == {1, 4, 8, 16}


def _launched(variant) -> list[tuple[str, Config]]:
    return [(plan.kernel.fn.__name__, plan.config) for plan, _ in variant.launches]


@pytest.mark.interpreter
def test_a_variant_times_its_own_operation():
    """And the form of two kernels what was found for each of them."""
    family, tuner = FAMILIES["separable_conv2d"], Tuner(torch.float32, CPU)
    first, second = Config(4, 16, 4, 1, 1), Config(16, 16, 16, 4, 2)
    rows, product = "_depthwise_conv2d_rows_kernel", "_conv2d_forward_kernel"
    for operation, config in (("depthwise_conv2d_forward", first), ("pointwise_conv2d_forward", second)):
        tuned = Tuned(operation, operation, "", config, 1.0, 2.0, [])
        tuner.found[operation, family.layer_of(operation, WALKS)] = tuned
    parts = tuner.parts(family, "separable_conv2d_forward", WALKS)
    assert parts == {"depthwise_conv2d_forward": first, "pointwise_conv2d_forward": second}
    with segfast.backend("triton"):
        forms = {}
        run, *_ = tuner.calls(family, "separable_conv2d_forward", WALKS)
        for variant in variants("separable_conv2d_forward", run, CPU, parts):
            assert variant.operation == "separable_conv2d_forward"
            forms.setdefault(variant.config.form, []).append(_launched(variant))
        assert forms["two kernels"] == [[(rows, first), (product, second)]]
        assert all(len(launched) == 1 for launched in forms["fused"])
        for operation, kernel in (("depthwise_conv2d_forward", rows), ("pointwise_conv2d_forward", product)):
            run, *_ = tuner.calls(family, operation, WALKS)
            found = list(variants(operation, run, CPU))
            assert len(found) > 1
            for variant in found:
                assert variant.operation == operation
                assert _launched(variant) == [(kernel, variant.config)]
    assert _configs._overrides == {}


@pytest.mark.interpreter
@pytest.mark.parametrize(("layer", "suffix"), [(WALKS, ""), (TAPS, "_taps")])
def test_each_direction_launches_its_own_kernel(layer, suffix):
    tuner = Tuner(torch.float32, CPU)
    with segfast.backend("triton"):
        for family, operation, _ in work({"separable_conv2d": [layer]}):
            if operation in family.per_channel:
                run, *_ = tuner.calls(family, operation, layer)
                kernel = operation if suffix == "" else operation.removesuffix("_forward") + suffix
                assert {variant.operation for variant in variants(operation, run, CPU)} == {kernel}


@pytest.mark.interpreter
def test_every_configuration_is_compiled_before_a_gpu_run_tunes():
    from benchmarks.precompile import _tuning_launches

    todo = tuning.work([find("decoder_sep_256")], tiny=True)
    tasks = {task[2]: task for task in tuning.tuning_tasks(todo)}
    assert list(tasks) == [item.operation for item in todo]
    with segfast.backend("triton"):
        found = _tuning_launches(CPU, *tasks["separable_conv2d_forward"][1:])
    names = {plan.kernel.fn.__name__ for plan, _ in found}
    assert names == {
        "_separable_conv2d_fused_kernel", "_depthwise_conv2d_rows_kernel", "_conv2d_forward_kernel"
    }  # fmt: skip
