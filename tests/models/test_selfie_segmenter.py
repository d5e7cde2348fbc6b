"""The portrait segmenter: MediaPipe's own file run beside it, its weights, and what every network must do."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segfast._errors import UserError
from segfast.data import astronaut, convert_selfie, read_photo
from segfast.models import SelfieSegmenter
from segfast.nn import Conv2d, ConvTranspose2d, DepthwiseConv2d
from tests.models.tester import ModelTester

ROOT = Path(__file__).resolve().parent.parent
TFLITE = ROOT / "data" / "selfie_segmentation.tflite"
WEIGHTS = Path(convert_selfie.__file__).with_name("selfie_segmenter.safetensors")


class TestSelfieSegmenter(ModelTester):
    name = "selfie_segmenter"
    options = {"in_channels": 3, "num_classes": 2}  # noqa: RUF012
    paper = "Howard et al."
    parameters = 106_401


@pytest.fixture(scope="module")
def published():
    """The published file: `[1, 256, 256, 3]` -> `[256, 256]`, run by TensorFlow Lite's successor."""
    litert = pytest.importorskip(
        "ai_edge_litert.interpreter", reason="needs ai-edge-litert (the extra 'test')"
    )
    interpreter = litert.Interpreter(str(TFLITE), num_threads=1)
    interpreter.allocate_tensors()
    [image], [mask] = interpreter.get_input_details(), interpreter.get_output_details()

    def run(pixels: torch.Tensor) -> torch.Tensor:
        interpreter.set_tensor(image["index"], pixels.movedim(1, -1).contiguous().numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(mask["index"]).copy())[0, ..., 0]

    return run


def photos() -> dict[str, torch.Tensor]:
    """Two portraits, whole and in part, upright and not, in good light and bad: float32 `[3, H, W]`."""
    from matplotlib import cbook

    collins = astronaut() / 255
    hopper = read_photo(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) / 255
    return {
        "Collins": collins,
        "Collins, mirrored": collins.flip(-1),
        "Collins, upside down": collins.flip(-2),
        "Collins, dark": 0.2 * collins,
        "Collins, only rocket and flag": torch.cat((collins[:, :200, :90], collins[:, :200, 330:]), -1),
        "Collins, the face": collins[:, :180, 130:310],
        "Hopper": hopper,
        "Hopper, lower half": hopper[:, 300:],
        "Hopper, overexposed": (2 * hopper).clamp(max=1),
        "Hopper, gray": hopper.mean(0, keepdim=True).expand(3, -1, -1),
    }


@pytest.mark.parametrize("channels_last", [False, True])
def test_masks_are_the_published_ones(published, channels_last):
    """Measured: 5.4e-5 at most; on nine photos of scikit-image, 1.1e-4."""
    model = SelfieSegmenter(pretrained=True).eval()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    shares = {}
    for name, photo in photos().items():
        pixels = F.interpolate(photo[None], (256, 256), mode="bilinear", antialias=True)
        expected = published(pixels)
        with torch.no_grad():
            mask = model(pixels).sigmoid()[0, 0]
        assert (mask - expected).abs().max() < 5e-3, name
        shares[name] = expected.mean().item()
    # The photos put the network to the test: persons of all sizes, and none.
    assert shares["Collins"] > 0.5 and shares["Hopper"] > 0.5
    assert min(shares.values()) < 0.1 < 0.75 < max(shares.values()), shares


def test_shipped_weights_are_the_published_ones(published):
    from safetensors.torch import load_file

    digest = hashlib.sha256(TFLITE.read_bytes()).hexdigest()
    for readme in (TFLITE.with_name("README.md"), WEIGHTS.with_name("README.md")):
        assert digest in readme.read_text()
    converted, shipped = convert_selfie.convert(TFLITE), load_file(WEIGHTS)
    assert converted.keys() == shipped.keys()
    for name, tensor in converted.items():
        assert tensor.dtype is shipped[name].dtype is torch.float16
        assert torch.equal(tensor, shipped[name]), name


def test_conversion_command_writes_the_shipped_file(published, tmp_path, capsys):
    convert_selfie.main([str(TFLITE), str(tmp_path / "out.safetensors")])
    assert (tmp_path / "out.safetensors").read_bytes() == WEIGHTS.read_bytes()
    assert "110 tensors, 106401 values" in capsys.readouterr().out


def test_conversion_of_another_network(monkeypatch):
    def constant(name):
        return np.zeros((1, 1, 1, 16) if name.endswith("Kernel") else 16, np.float16)

    monkeypatch.setattr(convert_selfie, "tflite_constants", lambda path: constant)
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.weight"):
        convert_selfie.convert("other.tflite")


def test_layers():
    """As many of each kind as the published graph has, and none of torch's that segfast has its own of."""
    model = SelfieSegmenter()
    kinds = [type(module) for module in model.modules()]
    counts = [kinds.count(kind) for kind in (nn.Conv2d, Conv2d, DepthwiseConv2d, ConvTranspose2d)]
    assert counts == [30, 13, 11, 1]  # 43 convolutions, of which 13 have their activation in them
    assert nn.ConvTranspose2d not in kinds


def test_pretrained_by_name_and_its_config():
    from segfast.models import create

    model = create("selfie_segmenter", pretrained=True)
    assert model.config == {"in_channels": 3, "num_classes": 1}
    assert model.stem.weight.dtype is torch.float32
    torch.testing.assert_close(model.head.bias, SelfieSegmenter(pretrained=True).head.bias)


@pytest.mark.parametrize("options", [{"in_channels": 1}, {"num_classes": 2}])
def test_no_pretrained_weights_for_other_channels(options):
    with pytest.raises(ValueError, match="pretrained weights are for in_channels=3 and num_classes=1"):
        SelfieSegmenter(pretrained=True, **options)


@pytest.mark.parametrize("name", ["in_channels", "num_classes"])
def test_bad_channels(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        SelfieSegmenter(**{name: 0})


def test_without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="need the package safetensors"):
        SelfieSegmenter(pretrained=True)
    SelfieSegmenter()


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 8), (9, 5), (1, 2)])
def test_padding_of_stride_2_is_tensorflows(kernel_size, size):
    from segfast.models.selfie_segmenter import _pad_for_stride_2

    padded = _pad_for_stride_2(torch.ones(1, 1, *size), kernel_size)[0, 0]
    for dim, length in enumerate(size):
        # TensorFlow: pad_along = max((out - 1) * stride + kernel - in, 0), before = pad_along // 2.
        total = max((-(-length // 2) - 1) * 2 + kernel_size - length, 0)
        assert padded.shape[dim] == length + total
        inside = padded.amax(1 - dim).nonzero()
        assert inside[0].item() == total // 2 and len(inside) == length
