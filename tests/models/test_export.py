"""Optimized networks as others run them: ONNX, exported programs, AOTInductor's packages, traces."""

import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import segfast
from segfast.models import SelfieSegmenter, UNet, create
from segfast.nn import ASPP, ConvTranspose2d
from tests import free_sizes
from tests.models import peers

ASPP_NETWORK = {"width_mult": 0.125, "middle_blocks": 1, "decoder_channels": 16, "num_classes": 3}
NETWORKS = {
    "unet": lambda: UNet(3, 2, width=4, depth=2, norm="batch"),
    "fcn": lambda: create("fcn8s", width=2, num_classes=3),
    "deeplabv3plus": lambda: create("deeplabv3plus_xception65", **ASPP_NETWORK),
    "portrait": SelfieSegmenter,
    "aspp": lambda: ASPP(3, [2, 4], 4),
}


def optimized(name):
    """The network with weights that keep its maps of one magnitude, and an image for it."""
    torch.manual_seed(0)
    network = peers.randomize_norms(NETWORKS[name]().eval())
    for module in network.modules():
        if type(module).__name__ == "Conv2d":
            nn.init.kaiming_normal_(module.weight)
    image = torch.randn(1, 3, 64, 96)
    return segfast.optimize(network, image), image


def assert_runs_alike(run, network, *sizes):
    """`run` computes what the network does, whose scores differ by more than what is tolerated."""
    for size in sizes:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = network(image)
        assert expected.std() > 1e-2
        torch.testing.assert_close(run(image), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def onnx_program(model, *args, **options):
    pytest.importorskip("onnxscript", reason="needs onnxscript (the extra 'test')")
    program = torch.onnx.export(model, args, dynamo=True, verbose=False, **options)
    # "" is of the standard operators.
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    return program.model_proto.SerializeToString()


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_computes_the_same_at_any_size(name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra 'test')")
    network, image = optimized(name)
    session = onnxruntime.InferenceSession(onnx_program(network, image, dynamic_shapes=({2: "h", 3: "w"},)))
    [given] = session.get_inputs()
    [_, _, *size] = given.shape
    assert size == ["h", "w"]
    assert_runs_alike(
        lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]), network, (64, 96), (96, 72)
    )


def test_onnx_gets_no_operator_of_ours_whatever_the_backend():
    layer = ConvTranspose2d(2, 3, 2, stride=2).eval()
    with segfast.backend("triton"):
        onnx_program(layer, torch.randn(1, 2, 5, 6))
        assert segfast.get_backend() == "triton"


def test_a_program_is_saved_and_loaded():
    network, image = optimized("unet")
    height, width = free_sizes.dims(32, 512)
    file = io.BytesIO()
    program = torch.export.export(network, (image,), dynamic_shapes=({2: height, 3: width},))
    torch.export.save(program, file)
    file.seek(0)
    assert_runs_alike(torch.export.load(file).module(), network, (64, 96), (96, 72))


def test_aotinductor_packages_one(tmp_path):
    network, image = optimized("unet")
    height, width = free_sizes.dims(32, 512)
    with torch.no_grad():
        program = torch.export.export(network, (image,), dynamic_shapes=({2: height, 3: width},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "unet.pt2"))
    assert_runs_alike(torch._inductor.aoti_load_package(path), network, (64, 96), (96, 72))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["unet", "fcn", "portrait", "aspp"])
def test_a_trace_computes_the_same(name):
    network, image = optimized(name)
    assert_runs_alike(torch.jit.trace(network, image), network, (64, 96))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_examples_on_the_page_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs onnxscript (the extra 'test')")
    free_sizes.dims(32, 512)
    page = Path(__file__).parents[2] / "docs" / "export.md"
    monkeypatch.chdir(tmp_path)
    space = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, "export.md", "exec"), space)
    for other in ("loaded", "traced"):
        torch.testing.assert_close(space[other](space["image"]), space["net"](space["image"]))
    assert Path("unet.onnx").stat().st_size > 1000
