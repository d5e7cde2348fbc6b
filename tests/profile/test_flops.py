"""FLOPs of the layers: they add up to what torch counts, and fvcore counts the same of convolutions."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast._optimize.verify import arguments, running_mode, undisturbed
from segfast._profile.passes import Task, flops_of, plan_of
from segfast.commands._load_model import import_torchvision, input_channels, load_model
from segfast.nn._fused.sequence import fusing

NETWORKS = (
    *("segfast:selfie_segmenter", "segfast:unet", "segfast:deeplabv3plus_mobilenet_v2"),
    *("torchvision:fcn_resnet50", "torchvision:deeplabv3_resnet50", "torchvision:lraspp_mobilenet_v3_large"),
    *("smp:Unet", "smp:FPN", "smp:PSPNet", "smp:Linknet"),
)
# fvcore's names of what torch counts: it counts norms, pools and resizes too.
MULTIPLYING = ("conv", "linear", "matmul", "addmm")
LIBRARIES = {"torchvision": "torchvision", "smp": "segmentation_models_pytorch", "segfast": "segfast"}


@pytest.fixture(scope="module")
def network(request) -> tuple[nn.Module, torch.Tensor]:
    """A network by name and images for it; skipped where its library is not installed."""
    if importlib.util.find_spec(LIBRARIES[request.param.partition(":")[0]]) is None:
        pytest.skip(f"{request.param}: not installed")
    torch.manual_seed(0)
    model = load_model(request.param)
    return model, torch.randn(2, input_channels(model), 32, 32)


def counted(model: nn.Module, images: torch.Tensor, train: bool) -> tuple[int, int]:
    """Those of the layers, forward and backward."""
    task = Task(model, arguments(images), train, images.device)
    with undisturbed(model), running_mode(model, train):
        plan = plan_of(task)
        found = flops_of(task, plan)
    return sum(found.forward.values()), sum(found.backward.values())


def torchs(model: nn.Module, images: torch.Tensor, train: bool) -> int:
    with undisturbed(model), running_mode(model, train), torch.set_grad_enabled(train):
        with FlopCounterMode(display=False) as counter:
            outputs = model(images)
            if train:
                scores = outputs["out"] if isinstance(outputs, dict) else outputs
                scores.sum().backward()
        return counter.get_total_flops()


@pytest.mark.parametrize("network", NETWORKS, indirect=True)
def test_the_layers_have_what_the_whole_has(network):
    """And of convolutions fvcore has the same, which counts a multiply-add as one."""
    model, images = network
    forward, backward = counted(model, images, False)
    assert forward == torchs(model, images, False) > 0
    assert backward == 0
    if importlib.util.find_spec("fvcore") is None:
        return
    from fvcore.nn import FlopCountAnalysis

    with torch.no_grad():
        counts = FlopCountAnalysis(model.eval(), images).unsupported_ops_warnings(False).by_operator()
    assert forward == pytest.approx(2 * sum(counts[each] for each in MULTIPLYING), rel=0.01)


@pytest.mark.parametrize("network", ["segfast:unet", "torchvision:fcn_resnet50", "smp:Unet"], indirect=True)
def test_backward_too(network):
    model, images = network
    forward, backward = counted(model, images, True)
    assert forward + backward == torchs(model, images, True)
    assert backward > forward


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_gradient_has_as_many_as_the_forward(kind, groups):
    """Of a grouped convolution's filters too, which torch counts as if there were no groups."""
    layer = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 8, 3, stride=2, padding=1, groups=groups))
    forward, backward = counted(layer, torch.randn(2, 3, 16, 16), True)
    first = 2 * 2 * 16 * 16 * 3 * 8
    # The images need no gradient.
    assert backward == 2 * (forward - first) + first
    if groups == 1:
        assert forward + backward == torchs(layer, torch.randn(2, 3, 16, 16), True)


def test_a_fused_layer_has_those_of_the_layers_in_it():
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(convolution, nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = 2 * 2 * 64 * 64 * (3 * 8 * 9 + 8 * 4)
    assert counted(model, images, False) == (expected, 0)
    fused = segfast.optimize(model)
    with fusing(True):
        found = segfast.profile(fused, images, seconds=0.01, budget=0, progress=False)
    layers = [(row.name, row.kind, row.flops) for row in found.rows if row.flops]
    assert layers == [
        ("0.0", "conv2d + batch_norm + activation", expected - 2 * 2 * 64 * 64 * 32),
        ("1", "conv2d", 2 * 2 * 64 * 64 * 32),
    ]


def test_an_aspp_that_is_fused_has_those_of_its_layers_once():
    try:
        deeplabv3 = import_torchvision("torchvision.models.segmentation.deeplabv3")
    except ImportError:
        pytest.skip("torchvision is not installed")
    model = nn.Sequential(deeplabv3.ASPP(8, [2, 4], 16)).eval()
    images = torch.randn(1, 8, 16, 16)
    fused = segfast.optimize(model, images)
    with fusing(True):
        found = segfast.profile(fused, images, seconds=0.01, budget=0, progress=False)
    [aspp] = [row for row in found.rows if row.kind == "aspp"]
    assert aspp.name == "0" and aspp.flops == counted(fused, images, False)[0] > 0
    assert aspp.flops == torchs(fused, images, False)


def test_calls_of_one_layer_have_their_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(self.conv(x)[:, :, ::2])

    found = segfast.profile(Twice(), torch.randn(1, 4, 8, 8), seconds=0.01, budget=0, progress=False)
    assert [row.flops for row in found.rows if row.name == "conv" and row.flops] == [2048, 1024]


def test_a_fixed_enlargement_that_a_forward_calls_is_one_row():
    """It runs one axis at a time, and where a counter looks as one transposed convolution."""
    weight, matrix = segfast.nn.init.bilinear_(torch.empty(4, 4, 16, 16)), torch.ones(24, 2)

    class Enlarges(nn.Module):
        def forward(self, x):
            return segfast.functional.conv_transpose2d(x, weight, stride=8, padding=4) @ matrix

    net, images = Enlarges(), torch.randn(1, 4, 3, 3)
    found = segfast.profile(net, images, seconds=0.01, budget=0, progress=False)
    product = 2 * 4 * 24 * 24 * 2
    # Copies within it are rows beside it.
    copies = ("layout copy", "between layers")
    layers = [(row.kind, row.flops) for row in found.rows if row.kind not in copies]
    assert layers == [("conv_transpose2d", torchs(net, images, False) - product), ("other", product)]
