"""Duties of every registered operator to torch: checks shared by the families' tests."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import segfast
from segfast.ops import FAMILIES

Samples = Callable[[], Iterator[Callable[[], Any]]]


def over_samples(samples: Mapping[str, Any], *more: Samples) -> pytest.MarkDecorator:
    """Parametrizes a test by `family`: the generator of calls by each family's name in `samples`, and `more`.

    A family without one is a KeyError.
    """
    families = [*(samples[name] for name in FAMILIES), *more]
    return pytest.mark.parametrize("family", families, ids=lambda family: family.__name__)


def _tensors(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def check_fake(operator, args) -> None:
    """A fake call and one on the meta device tell shape, strides and dtype of the real thing."""
    real = _tensors(operator(*args))
    with FakeTensorMode() as mode:
        fake = operator(*tree_map_only(torch.Tensor, mode.from_tensor, args))
    meta = operator(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args))
    for other in (fake, meta):
        for a, b in zip(_tensors(other), real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def check_decomposition(operator, args) -> None:
    """The operator and what `segfast.decompositions` has for it give the same, in the same strides."""
    actual = _tensors(operator(*args))
    reference = _tensors(segfast.ops.decompositions()[operator](*args))
    for a, b in zip(actual, reference, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
