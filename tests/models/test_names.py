"""Networks by name: the list, the nearest names, and that each name builds what it says."""

import pytest
import torch

from segfast._errors import UserError
from segfast.commands import _load_model
from segfast.models import create, list_models, model_name
from segfast.models._base import main_scores


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds_the_network_of_that_name(name, monkeypatch):
    """On the meta device: in full size, and nothing is computed."""
    with torch.device("meta"):
        model = create(name)
        twin = create(name, **model.config)
        two = create(name, num_classes=2, in_channels=5).eval()
        scores = main_scores(two(torch.empty(1, 5, 572, 572)))
    assert model_name(model) == model_name(two) == name
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in twin.state_dict().items()
    }
    assert scores.shape == (1, 2, 572, 572)
    # An image without a row or a column is named before a layer runs.
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("a layer ran"))
    for size in ((0, 64), (64, 0)):
        with pytest.raises(ValueError, match=r"input (must be|is) .*(H, W >= 1|at least 15x15)"):
            two(torch.empty(1, 5, *size, device="meta"))
    # As the commands take it.
    monkeypatch.setattr("segfast.models.create", lambda name: torch.nn.Identity(name))
    assert isinstance(_load_model.load_model(f"segfast:{name}"), torch.nn.Identity)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("option", ["num_classes", "in_channels"])
def test_no_classes_and_no_channels_are_errors(name, option):
    with torch.device("meta"), pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        create(name, **{option: 0})


def test_a_pattern_picks():
    assert list_models("*_resnet50*") == [name for name in list_models() if "_resnet50" in name]
    assert list_models("unet") == ["unet"] and list_models("nothing*") == []
    assert list_models() == sorted(set(list_models()))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("vnet", "unet"), ("fcn8", "fcn8s"), ("deeplabv3_resnet5", "deeplabv3_resnet50"), ("", "unet")],
)
def test_an_unknown_name_lists_the_nearest(name, nearest):
    message = rf"segfast has no model '{name}'; the nearest are .*\b{nearest}\b.*; segfast.models.list_models"
    with pytest.raises(ValueError, match=message):
        create(name)
    with pytest.raises(UserError, match=message if name else "MODEL must be one of"):
        _load_model.load_model(f"segfast:{name}")
