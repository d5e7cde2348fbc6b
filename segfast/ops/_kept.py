"""Keeping less for the backward pass: no activation that can be made again from the input of a norm.

A norm keeps its input, from which its own result, and that of the activation after it, follow by one pass
over the image. Operators called within `keeping_less` that would keep such a result keep how to make it
instead.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_autograd: Any = torch._C._autograd


class _Remade(NamedTuple):
    """How a tensor is made again: from others, which must not change meanwhile.

    `left_to` is the node that made it, if of those who ask on the way back only that node itself is after.
    """

    remake: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    left_to: Any


class _Same(NamedTuple):
    """A tensor kept as it is, and its version, which torch does not compare for us here.

    Without its place in the graph: a result that its own node keeps would hold that node, for ever.
    """

    tensor: Tensor
    version: int


_HOW, _LEFT = "_segfast_remake", "_segfast_left"


def can_be_remade(result: Tensor, remake: Callable[..., Tensor]) -> None:
    """Note that `remake` makes `result` again, of what the autograd Function that made it saved."""
    setattr(result.grad_fn, _HOW, (remake, _state(result)))


def is_remade(t: Tensor) -> bool:
    """True if `t` is such a result, as it was made: what keeps it may keep no image for it."""
    _, state = getattr(t.grad_fn, _HOW, (None, None))
    return state is not None and state == _state(t)


def _state(t: Tensor) -> tuple[int, int]:
    """How often it was written to, and where it lies, for `.data` may have been set."""
    return t._version, t.data_ptr()


def _pack(t: Tensor) -> _Remade | _Same:
    if not is_remade(t):
        return _Same(t.detach(), t._version)
    node: Any = t.grad_fn
    try:
        saved = tuple([None if s is None else s.detach() for s in node.saved_tensors])
    except RuntimeError:  # a backward pass has been there, and freed them
        return _Same(t.detach(), t._version)
    # What reads it first is the last to ask for it on the way back.
    first = not hasattr(node, _LEFT)
    setattr(node, _LEFT, None)
    return _Remade(getattr(node, _HOW)[0], saved, _versions(saved), node if first else None)


def _unpack(kept: _Remade | _Same) -> Tensor:
    if isinstance(kept, _Same):
        _check((kept.version,), (kept.tensor._version,))
        return kept.tensor
    _check(kept.versions, _versions(kept.tensors))
    with torch.no_grad():
        made = kept.remake(*kept.tensors)
    if kept.left_to is not None:
        setattr(kept.left_to, _LEFT, made)
    return made


def take_left(node: Any) -> Tensor | None:
    """The result of `node`, if it was just made again in this backward pass."""
    made = getattr(node, _LEFT, None)
    setattr(node, _LEFT, None)
    return made


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple([-1 if t is None else t._version for t in tensors])


def _check(saved: tuple[int, ...], now: tuple[int, ...]) -> None:
    if saved != now:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"it is at version {max(now)}; expected version {max(saved)} instead"
        )


@contextlib.contextmanager
def keeping_less() -> Iterator[None]:
    """Within it operators keep no result that can be made again; none of this under hooks of others."""
    if _top() is not None or not _autograd._saved_tensors_hooks_is_enabled():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def hooks_of_others() -> bool:
    """True if somebody else decides what the backward pass keeps: checkpointing does."""
    top = _top()
    return top is not None and top[0] is not _pack


def _top() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The innermost hooks on what is kept."""
    return _autograd._top_saved_tensors_default_hooks(False)
