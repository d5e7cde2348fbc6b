"""Models and sizes as the commands take them: each library's own way to build, on a stand-in for it."""

import importlib.util
import subprocess
import sys
import types

import pytest
from torch import nn

from segfast._errors import UserError
from segfast.commands._load_model import load_model, parse_size


class TestLibraries:
    """Each library's own way to build a model without weights, on a stand-in for the library."""

    @pytest.mark.parametrize(
        ("spec", "package"),
        [("torchvision:x", "torchvision"), ("smp:x", "segmentation_models_pytorch"), ("timm:x", "timm")],
    )
    def test_not_installed(self, monkeypatch, spec, package):
        for name in (package, f"{package}.models"):  # another test may have imported it
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"cannot import {package}"):
            load_model(spec)

    @pytest.mark.parametrize("spec", ["torchvision:mobilenet_v2", "smp:Unet", "timm:mobilenetv2_035"])
    def test_beside_a_cpu_build_of_torch(self, spec):
        """PyPI's torchvision has operators for CUDA; in a new process, for others have imported it here."""
        package = {"smp": "segmentation_models_pytorch"}.get(spec.partition(":")[0], spec.partition(":")[0])
        pytest.importorskip("PIL", reason="torchvision needs pillow")
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
        load = "from segfast.commands._load_model import load_model"
        code = f"import sys; {load}; print(type(load_model(sys.argv[1])))"
        done = subprocess.run([sys.executable, "-c", code, spec], capture_output=True, text=True)
        assert done.returncode == 0 and "class" in done.stdout, done.stderr[-500:]

    def test_a_torchvision_that_does_not_go_with_this_torch(self, monkeypatch):
        def fails(name):
            raise OSError("torchvision/_C.so: undefined symbol")

        monkeypatch.setattr("importlib.import_module", fails)
        with pytest.raises(
            UserError, match=r"cannot import timm: OSError: .*; torchvision must be built for"
        ):
            load_model("timm:resnet18")

    def test_torchvision(self, monkeypatch):
        asked = {}

        def fcn(*, weights="yes", weights_backbone="yes"):
            return nn.ReLU()

        def get_model(name, **options):
            asked[name] = options
            return fcn(**options)

        models = types.ModuleType("torchvision.models")
        models.list_models, models.get_model_builder, models.get_model = (
            lambda: ["fcn"],
            lambda name: fcn,
            get_model,
        )
        package = types.ModuleType("torchvision")
        package.models = models
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.models", models)
        assert isinstance(load_model("torchvision:fcn"), nn.ReLU)
        assert asked == {"fcn": {"weights": None, "weights_backbone": None}}
        with pytest.raises(UserError, match="torchvision has no model 'gcn'"):
            load_model("torchvision:gcn")

    def test_smp(self, monkeypatch):
        class Unet(nn.Module):
            def __init__(self, encoder_weights="imagenet"):
                super().__init__()
                self.encoder_weights = encoder_weights

        smp = types.ModuleType("segmentation_models_pytorch")
        smp.Unet = Unet
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", smp)
        assert load_model("smp:Unet").encoder_weights is None
        with pytest.raises(UserError, match="has no model 'losses'"):
            load_model("smp:losses")

    def test_timm(self, monkeypatch):
        timm = types.ModuleType("timm")
        timm.is_model = lambda name: name == "resnet18"
        timm.create_model = lambda name, pretrained: nn.ReLU() if not pretrained else None
        monkeypatch.setitem(sys.modules, "timm", timm)
        assert isinstance(load_model("timm:resnet18"), nn.ReLU)
        with pytest.raises(UserError, match="timm has no model 'resnet19'"):
            load_model("timm:resnet19")


@pytest.mark.parametrize("text", ["", "x", "8x", "x8", "8X8 ", "1e2x4", "²x4", "8x6x4", "8x-6"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--size must be HxW"):
        parse_size(text)
