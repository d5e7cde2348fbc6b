"""The interface of a network to the training loop, the checkpoints and the commands."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..nn._scripting import Unscriptable


class SegmentationModel(Unscriptable, nn.Module):
    """A network `[N, in_channels, H, W]` -> `[N, num_classes, H', W']`.

    Those that torchvision has too return its dictionary: such scores under "out", and under "aux" those of an
    auxiliary head. `segfast.train` reads both forms.

    `config` holds by name the arguments of the constructor, or of the function in `segfast.models` that made
    it; `segfast.models.create` rebuilds the network from them.
    """

    in_channels: int
    num_classes: int
    config: dict[str, Any]

    def _check_input(self, input: Tensor) -> None:
        """Raise ValueError for images that are not 4-D, or without a pixel."""
        if input.dim() != 4 or 0 in input.shape[2:]:
            raise ValueError(
                f"input must be [N, {self.in_channels}, H, W] with H, W >= 1, got shape {list(input.shape)}"
            )

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`: of a network that no other code base has, its own keys.

        Raises:
            ValueError: a checkpoint of another network.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if state.keys() != own.keys():
            raise ValueError(f"the checkpoint is not of {type(self).__name__}: {unlike(state, own)}")
        return state


def check_counts(**counts: int) -> None:
    """Raise ValueError for the first that is below 1."""
    for option, value in counts.items():
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")


# Under which training scripts keep the state_dict beside an epoch and an optimizer.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")


def tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under the names that the network gives them.

    Without what DataParallel (`module.`) and torch.compile (`_orig_mod.`) put into their keys, and from
    inside {"state_dict": ...}, {"model": ...} or the like.

    Raises:
        TypeError: it is no mapping.
        ValueError: it holds no tensor, or two under one name.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise TypeError(f"the checkpoint must be a mapping of names to tensors, got {kind}")
    for name in WRAPPERS:
        if isinstance(state_dict.get(name), Mapping):
            return tensors(state_dict[name])
    found: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            name = _without_wrappers(key)
            if name in found:
                raise ValueError(f"the checkpoint has {name} twice, once as {key}")
            found[name] = value
    if not found:
        seen = [f"{key!r} (a {type(value).__name__})" for key, value in list(state_dict.items())[:3]]
        raise ValueError(f"the checkpoint holds no tensors; it has {', '.join(seen) or 'nothing'}")
    return found


def unlike(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The keys that a checkpoint has and the model has not, and the other way round."""
    parts = {"has": sorted(state.keys() - own.keys()), "lacks": sorted(own.keys() - state.keys())}
    return ", and ".join(
        f"it {verb} {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for verb, keys in parts.items() if keys
    )


def _without_wrappers(key: str) -> str:
    """torch.compile may have wrapped a layer, DataParallel only the whole."""
    key = key.replace("._orig_mod.", ".")
    while key.startswith(("module.", "_orig_mod.")):
        key = key.partition(".")[2]
    return key


def main_scores(output: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The scores of a network's output, of either form (see `SegmentationModel`)."""
    return output if isinstance(output, Tensor) else output["out"]
