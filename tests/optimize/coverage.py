"""The effect of `segfast.optimize` on published networks, as the table in docs/optimize-coverage.md.

`python -m tests.optimize.coverage` writes it anew.
"""

import functools
import importlib.util
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import segfast
from segfast._optimize.eligible import RECORD
from segfast.commands._load_model import import_torchvision
from segfast.nn._fused.sequence import sequence_of
from segfast.nn._rules import own_class
from tests.fused_conv import draw

PAGE = Path(__file__).parents[2] / "docs" / "optimize-coverage.md"
TORCHVISIONS = ("fcn_resnet50", "deeplabv3_resnet50")
SMPS = ("Unet", "Linknet", "PAN", "DeepLabV3", "DeepLabV3Plus")
MODELS = (*TORCHVISIONS, *SMPS)
HAS_SMP = importlib.util.find_spec("segmentation_models_pytorch") is not None
HEAD = """# What `segfast.optimize` does to published networks

`segfast.optimize(model, image)` on torchvision's networks and on segmentation_models_pytorch's (smp) with a
ResNet-18 encoder. Replaced layers changed their class, for train and eval; fused ones are computed together
in eval; a class alone (ASPP, Bottleneck) is a module with all that is in it. None of it says how fast
that is.

A test compares this page with what happens; `python -m tests.optimize.coverage` writes it anew.

| network | replaced | fused | left alone |
|---|---|---|---|
"""


def build(name: str) -> nn.Module:
    """The network, `pretrained`."""
    import_torchvision()
    torch.manual_seed(0)
    if name in TORCHVISIONS:
        from torchvision.models import segmentation

        model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)
    else:
        import segmentation_models_pytorch as smp

        model = getattr(smp, name)("resnet18", encoder_weights=None, classes=3)
    return pretrained(model)


def pretrained(model: nn.Module) -> nn.Module:
    """In eval, its statistics near enough to one that the signal passes through all layers."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.7, 1.5)
            nn.init.uniform_(norm.weight, 0.7, 1.3)
            nn.init.normal_(norm.bias, 0, 0.2)
    return model.eval()


def example(name: str) -> torch.Tensor:
    """An image; PAN halves its own five times and then three times more."""
    return draw(1, 3, *(2 * [128 if name == "PAN" else 64]))


@functools.cache
def optimized(name: str) -> tuple[nn.Module, nn.Module]:
    """The network and its optimized copy."""
    model = build(name)
    return model, segfast.optimize(model, example(name))


def row(name: str) -> str:
    """The network's line of the table."""
    _, model = optimized(name)
    report = segfast.report(model)
    replaced = Counter(_kind(model.get_submodule(layer)) for layer in report.replaced)
    fused = Counter(_fused_kinds(model.get_submodule(layer)) for layer in report.fused)
    inside = tuple(f"{layer}." for layer in report.fused if sequence_of(model.get_submodule(layer)) is None)
    alone: Counter[str] = Counter()
    for layer, module in model.named_modules():
        reason = vars(module).get(RECORD, {}).get("not_fused")
        if reason is not None and not layer.startswith(inside):
            alone[f"{_kind(module)}: {reason}"] += 1
    library = "torchvision" if name in TORCHVISIONS else "smp"
    return f"| {library} {name} | {_listed(replaced)} | {_listed(fused)} | {_listed(alone)} |"


def _kind(module: nn.Module) -> str:
    """The class; of a dilated convolution that as well."""
    kind = own_class(module)
    dilated = getattr(module, "dilation", 1) not in (1, (1, 1))
    return f"{'dilated ' if dilated else ''}{kind.__name__}"


def _fused_kinds(module: nn.Module) -> str:
    sequence = sequence_of(module)
    return _kind(module) if sequence is None else " + ".join(own_class(m).__name__ for m in sequence.layers)


def _listed(counts: Counter) -> str:
    return "<br>".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "-"


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"{row(name)}\n" for name in MODELS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
