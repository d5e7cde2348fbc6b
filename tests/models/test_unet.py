"""U-Net: the paper's sizes, equality with plain torch.nn, odd sizes, foreign checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import segfast.models.unet
from segfast.models import UNet, create, remap_state_dict
from segfast.train import load_checkpoint, predict_scores, save_checkpoint
from tests import free_sizes
from tests.models.tester import ModelTester


class TestUNet(ModelTester):
    name = "unet"
    options = {"width": 4, "depth": 2}  # noqa: RUF012
    paper = "Ronneberger, Fischer, Brox"
    parameters = 31_030_658


class TestUNetBatchNorm(ModelTester):
    name = "unet"
    options = {"width": 4, "depth": 2, "norm": "batch", "activation": "leaky_relu"}  # noqa: RUF012
    full = {"norm": "batch"}  # noqa: RUF012
    paper = "Ronneberger, Fischer, Brox"
    parameters = 31_036_546
    sizes = ((32, 48), (37, 50), (5, 6))
    test_compiles_into_one_graph = None  # seconds, and nothing new


class TestUNetUpsampled(ModelTester):
    name = "unet"
    options = {"width": 4, "depth": 2, "up": "upsample"}  # noqa: RUF012
    full = {"up": "upsample"}  # noqa: RUF012
    paper = "Ronneberger, Fischer, Brox"
    # Nine taps instead of four, for a pixel and not for each of four.
    parameters = 31_030_658 + sum(5 * 2 * 64**2 * 4**level for level in range(4))
    test_compiles_into_one_graph = None  # seconds, and nothing new


class PlainUNet(nn.Module):
    """The network again, in torch.nn alone; submodules are declared in the order of `UNet`'s."""

    def __init__(self, in_channels, num_classes, width, depth, padding, slope=0.0, norm=False):
        super().__init__()
        widths = [width << level for level in range(depth + 1)]

        def convs(i, o):
            layers = []
            for channels in (i, o):
                layers += [nn.Conv2d(channels, o, 3, padding=padding, bias=not norm)]
                layers += [nn.BatchNorm2d(o)] * norm
                layers += [nn.LeakyReLU(slope)]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(convs(([in_channels, *widths])[i], widths[i]) for i in range(depth))
        self.bottom = convs(widths[-2], widths[-1])
        self.up = nn.ModuleList(
            nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, 2), convs(2 * w, w)]) for w in widths[-2::-1]
        )
        self.last = nn.Conv2d(width, num_classes, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for (up, block), skip in zip(self.up, reversed(skips), strict=True):
            if all(0 <= s - 2 * u < 2 for s, u in zip(skip.shape[2:], x.shape[2:], strict=True)):
                x = up(x, output_size=skip.shape[2:])
            else:
                x = up(x)
                top, left = ((s - u) // 2 for s, u in zip(skip.shape[2:], x.shape[2:], strict=True))
                skip = skip[..., top : top + x.shape[2], left : left + x.shape[3]]
            x = block(torch.cat([skip, x], 1))
        return self.last(x)


def pair(depth=2, width=4, *, padded=True, slope=0.0, norm=False):
    """Our network and the plain one with the same weights."""
    torch.manual_seed(0)
    activation = {"activation": "leaky_relu", "negative_slope": slope} if slope else {}
    ours = UNet(2, 3, width=width, depth=depth, padded=padded, norm="batch" if norm else None, **activation)
    plain = PlainUNet(2, 3, width, depth, 1 if padded else 0, slope, norm)
    values = ours.state_dict().values()
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    return ours, plain


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("padded", [True, False])
def test_as_many_parameters_as_plain_torch(padded, norm):
    with torch.device("meta"):
        ours = UNet(padded=padded, norm=norm)
        plain = PlainUNet(1, 2, 64, 4, 1 if padded else 0, norm=norm is not None)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in plain.parameters())
    assert norm or count == 31_030_658


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (24, 32)),
        ({}, (27, 33)),
        ({"slope": 0.1}, (7, 7)),
        ({"norm": True}, (21, 22)),
        ({"padded": False}, (44, 52)),
        ({"padded": False, "slope": 0.1}, (47, 53)),
    ],
)
def test_computes_what_plain_torch_computes(options, size):
    ours, plain = pair(**options)
    images = torch.randn(2, 2, *size)
    expected, output = plain(images), ours(images)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    gradient = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, list(plain.parameters()), gradient)
    found = torch.autograd.grad(output, list(ours.parameters()), gradient)
    for name, a, b in zip(dict(ours.named_parameters()), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (27, 33)),
        ({"norm": "batch"}, (24, 32)),
        ({"padded": False}, (44, 52)),
        ({"padded": False}, (47, 53)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_without_a_concatenation(options, size, training, monkeypatch):
    """As on our kernel: the decoder's first convolutions read skip and up-convolution where they lie."""
    torch.manual_seed(0)
    model = UNet(2, 3, width=4, depth=2, **options).train(training)
    images = torch.randn(2, 2, *size)

    def results():
        output = model(images)
        return [output, *torch.autograd.grad(output.square().mean(), list(model.parameters()))]

    expected, asked = results(), []
    monkeypatch.setattr(
        segfast.models.unet,
        "prefers_virtual_concat",
        lambda images, weight, padding: asked.append((weight.shape, padding)) or True,
    )
    monkeypatch.setattr(segfast.models.unet, "up_concat", lambda *_, **__: pytest.fail("a concatenation"))
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    pads = (1, 1) if options.get("padded", True) else (0, 0)
    assert asked == [((8, 16, 3, 3), pads), ((4, 8, 3, 3), pads)]


def checkerboard_energy(model: UNet) -> float:
    """The variance of what the network makes of a uniform image, over its mean square, away from the border.

    There is nothing in the image for it to vary with: what it varies with is the place in its own grids.
    """
    image = torch.ones(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_()  # biases: without them all may be zero here
        inside = model.double().eval()(image)[0, :, 32:-32, 32:-32]
    return (inside.var((1, 2)).sum() / inside.square().mean((1, 2)).sum()).item()


@pytest.mark.parametrize("seed", range(3))
def test_upsampling_leaves_no_checkerboard(seed):
    energy = {}
    for up in ("transposed", "upsample"):
        torch.manual_seed(seed)
        energy[up] = checkerboard_energy(UNet(3, 2, width=4, depth=2, up=up))
    assert energy["upsample"] < 1e-20 and energy["transposed"] > 1e-4, energy


def test_upsampling_computes_what_plain_torch_computes():
    """Nearest neighbors, a 3x3 convolution, and where a side is odd the last row or column repeated."""
    torch.manual_seed(0)
    block = UNet(1, 2, width=4, depth=1, up="upsample").decoder[0]
    low, skip = torch.randn(2, 8, 5, 6), torch.randn(2, 4, 11, 12)
    up = F.conv2d(F.interpolate(low, scale_factor=2), block.up.conv.weight, block.up.conv.bias, padding=1)
    x = torch.cat([skip, torch.cat([up, up[:, :, -1:]], 2)], 1)
    for conv in (block.conv.conv1, block.conv.conv2):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
    torch.testing.assert_close(block(low, skip), x, rtol=1e-4, atol=1e-5)


def test_the_papers_sizes_and_crops(monkeypatch):
    crops = []

    def recorded(x, skip, *args, **kwargs):
        result = segfast.functional.up_concat(x, skip, *args, **kwargs)
        crops.append((skip.shape[-1] - result.shape[-1]) / 2)
        return result

    monkeypatch.setattr(segfast.models.unet, "up_concat", recorded)
    model = UNet(width=1, padded=False)
    assert model(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert crops == [4, 16, 40, 88]
    assert model.margin == (572 - 388) / 2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_output_size_and_smallest_unpadded_input(depth):
    model = UNet(width=1, depth=depth, padded=False)
    sizes = [n for n in range(1, 120) if model.output_size(n, n)[0] >= 1]
    for n in (sizes[0], sizes[1], sizes[-1]):
        assert model(torch.zeros(1, 1, n, sizes[0])).shape[2:] == model.output_size(n, sizes[0])
    with pytest.raises(ValueError, match=rf"{sizes[0] - 1}x50.*at least {sizes[0]}x{sizes[0]}"):
        model(torch.zeros(1, 1, sizes[0] - 1, 50))


def test_small_inputs_are_zero_padded_to_the_divisor():
    model = UNet(width=2, depth=3)
    image = torch.randn(1, 1, 5, 9)
    padded = F.pad(image, (0, 0, 0, 3))
    torch.testing.assert_close(model(image), model(padded)[:, :, :5])
    assert model.size_divisor == 8


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    model = UNet(width=64, depth=2)
    deviation = model.encoder[1].conv2.weight.std().item()
    assert deviation == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert model.decoder[0].up.weight.std().item() == pytest.approx((1 / 256) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"width": -3}, "width must be at least 1, got -3"),
        ({"activation": "gelu"}, "activation must be one of .*'gelu'"),
        ({"norm": "layer"}, "norm must be one of .*'layer'"),
        ({"up": "bilinear"}, "up must be one of .*'bilinear'"),
        ({"up": "upsample", "padded": False}, "up='upsample' is for the padded network"),
        (
            {"up": "upsample", "zero_pad_up": True},
            "without zero_pad_up, got padded=True and zero_pad_up=True",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**options)


def milesial(in_channels=3, num_classes=2, width=4, depth=4, bias=False, bilinear=False):
    """A network whose state_dict has the keys of milesial/Pytorch-UNet."""

    def double_conv(i, o):
        block = nn.Module()
        convs = [nn.Conv2d(i, o, 3, padding=1, bias=bias), nn.Conv2d(o, o, 3, padding=1, bias=bias)]
        norms = [nn.BatchNorm2d(o), nn.BatchNorm2d(o)]
        block.double_conv = nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.ReLU())
        return block

    torch.manual_seed(3)
    net = nn.Module()
    net.depth = depth
    net.inc = double_conv(in_channels, width)
    for level in range(depth):
        down, up = nn.Module(), nn.Module()
        down.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), double_conv(width << level, width << level + 1))
        deep = width << depth - level
        if not bilinear:
            up.up = nn.ConvTranspose2d(deep, deep // 2, 2, 2)
        up.conv = double_conv(deep, deep // 2)
        net.add_module(f"down{level + 1}", down)
        net.add_module(f"up{level + 1}", up)
    net.outc = nn.Module()
    net.outc.conv = nn.Conv2d(width, num_classes, 1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return net


def run_milesial(net, x):
    """Its published forward: the up-convolution is padded with zeros to the skip's size."""
    skips = [net.inc.double_conv(x)]
    for level in range(1, net.depth + 1):
        pool, block = getattr(net, f"down{level}").maxpool_conv
        skips.append(block.double_conv(pool(skips[-1])))
    x2 = skips.pop()
    for level in range(1, net.depth + 1):
        step = getattr(net, f"up{level}")
        x1, x2 = step.up(x2), skips.pop()
        rows, columns = (x2.size(axis) - x1.size(axis) for axis in (2, 3))
        x1 = F.pad(x1, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        x2 = step.conv.double_conv(torch.cat([x2, x1], 1))
    return net.outc.conv(x2)


def load_milesial(theirs, **options):
    model = UNet(3, 2, width=4, norm="batch", **options)
    model.load_state_dict(remap_state_dict(theirs.state_dict(), model))
    return model


@pytest.mark.parametrize("bias", [False, True], ids=["current", "with conv bias"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_milesial_checkpoint_loads_and_computes_the_same(bias, prefix):
    theirs = milesial(bias=bias)
    checkpoint = {prefix + key: value for key, value in theirs.state_dict().items()}
    checkpoint["mask_values"] = [0, 1]  # their training script adds this
    model = UNet(3, 2, width=4, norm="batch")
    model.load_state_dict(remap_state_dict(checkpoint, model))
    image = torch.randn(2, 3, 33, 50)
    for train in (False, True, False):  # the training pass moves the running statistics of both
        expected, output = run_milesial(theirs.train(train), image), model.train(train)(image)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


MILESIAL_SIZES = [(16, 16), (17, 23), (31, 31), (33, 50), (40, 47), (16, 65)]


@pytest.mark.parametrize("size", MILESIAL_SIZES, ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["one buffer", "images apart"])
def test_milesial_network_at_every_size(size, apart, monkeypatch, tmp_path):
    theirs = milesial().eval()
    model = load_milesial(theirs).eval()
    # As on our kernel, which reads skip and up-convolution where they lie.
    monkeypatch.setattr(segfast.models.unet, "prefers_virtual_concat", lambda images, weight, padding: apart)
    image = torch.randn(2, 3, *size)
    expected, output = run_milesial(theirs, image), model(image)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    gradient = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, [getattr(theirs, f"up{i}").up.bias for i in range(1, 5)], gradient)
    found = torch.autograd.grad(output, [block.up.bias for block in model.decoder], gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(segfast.optimize(model)(image), expected, rtol=1e-3, atol=1e-4)
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(image), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(predict_scores(model, image[0]), expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"zero_pad_up": True}, {"padded": False, "depth": 1}], ids=str)
def test_exports_for_a_range_of_sizes(options, strict):
    """As plain torch's does, from 32 on: below, the deepest maps are one pixel, which torch asks about."""
    torch.manual_seed(0)
    model = UNet(width=2, **options).eval()
    for block in model.decoder:
        torch.nn.init.constant_(block.up.bias, 1)
    height, width = free_sizes.dims(32, 512)
    example = torch.randn(1, 1, 64, 96)
    program = torch.export.export(
        model, (example,), dynamic_shapes=({2: height, 3: width},), strict=strict
    ).module()
    for size in ((32, 48), (37, 51), (63, 33), (64, 40)):
        image = torch.randn(1, 1, *size)
        torch.testing.assert_close(program(image), model(image), rtol=1e-4, atol=1e-5)


def test_one_program_for_all_parities():
    """Compiled for free sizes, a network loaded from there is not compiled anew for odd ones."""
    free_sizes.dims(32, 512)  # or the poolings ask for it
    theirs = milesial(depth=2).eval()
    model = UNet(3, 2, width=4, depth=2, norm="batch")
    model.load_state_dict(remap_state_dict(theirs.state_dict(), model))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.eval(), fullgraph=True, backend=counter, dynamic=True)
    frames = set()
    with torch.no_grad():
        for size in ((32, 48), (33, 50), (34, 35), (47, 41)):
            image = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(image), run_milesial(theirs, image), rtol=1e-3, atol=1e-4)
            # Dynamo begins the first once more, when a norm's eps turns out not to be free.
            frames.add(counter.frame_count)
    assert len(frames) == 1


def test_zero_padding_is_of_the_padded_network():
    with pytest.raises(ValueError, match="zero_pad_up is for the padded network"):
        UNet(padded=False, zero_pad_up=True)
    model = load_milesial(milesial(), padded=False)
    assert create("unet", **model.config).config == model.config and not model.config["zero_pad_up"]


def test_milesial_checkpoint_of_another_depth():
    model = UNet(1, 3, width=2, depth=2, norm="batch")
    model.load_state_dict(remap_state_dict(milesial(1, 3, 2, depth=2).state_dict(), model))


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ({"bilinear": True}, {}, r"bilinear variant: .*up1\.up\.weight"),
        ({"num_classes": 7}, {}, r"needs UNet\(num_classes=7\); the model has num_classes=2"),
        ({}, {"norm": None}, r"needs UNet\(norm='batch'\); the model has norm=None"),
        ({"width": 2}, {"depth": 3}, r"needs UNet\(width=2, depth=4\); the model has width=4, depth=3"),
    ],
)
def test_milesial_checkpoint_refused(checkpoint, options, message):
    model = UNet(3, 2, **{"width": 4, "norm": "batch", **options})
    with pytest.raises(ValueError, match=message):
        remap_state_dict(milesial(**checkpoint).state_dict(), model)


@pytest.mark.parametrize("change", ["drop", "extra", "shape"])
def test_damaged_milesial_checkpoint_names_the_key(change):
    state = milesial().state_dict()
    key = "down2.maxpool_conv.1.double_conv.3.weight"
    if change == "drop":
        del state[key]
    elif change == "extra":
        state["attention.weight"] = torch.zeros(1)
    else:
        state[key] = state[key][:1]
    model = UNet(3, 2, width=4, norm="batch")
    with pytest.raises(
        ValueError, match="attention.weight" if change == "extra" else "encoder.2.conv2.weight"
    ):
        remap_state_dict(state, model)


def test_alien_checkpoints_and_models():
    with pytest.raises(ValueError, match=r"neither UNet's own nor of the milesial layout: fc\.weight"):
        remap_state_dict({"fc.weight": torch.zeros(1)}, UNet(width=2))
    with pytest.raises(TypeError, match="Linear has no foreign checkpoint layout"):
        remap_state_dict({}, nn.Linear(1, 1))
