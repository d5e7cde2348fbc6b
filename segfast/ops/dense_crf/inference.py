"""Mean-field inference of one image: values [N, L], one row a pixel, one column a label.

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (2011),
algorithm 1, with the conventions of its published code: a pixel sends itself a message too.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._threads import each, on_threads
from .chunks import chunks_of
from .filters import Filter

# A number w is Potts: -w on the diagonal, which up to a constant is w for each pair of different labels. A
# vector [L] is the diagonal itself, a matrix [L, L] the whole: energies, entry (i, j) what i pays for j.
Compatibility = float | Tensor


# Sums of exponentials between this and its inverse keep their small terms, those of 1e-20 beside 1 too.
_SMALL = 1e-15


class Term(NamedTuple):
    """One pairwise term: the energy is the compatibility applied to the filtered probabilities."""

    filter: Filter
    compatibility: Compatibility


def start(unary: Tensor) -> Tensor:
    """The probabilities [..., N, L] of energies [..., N, L] alone."""
    return torch.softmax(-unary, -1)


def step(q: Tensor, unary: Tensor, terms: Sequence[Term]) -> Tensor:
    """One parallel update of all pixels."""
    logits = -unary
    for term in terms:
        logits = logits - apply_compatibility(term.compatibility, term.filter(q))
    return torch.softmax(logits, -1)


def unroll(unary: Tensor, terms: Sequence[Term], iterations: int) -> Tensor:
    """The probabilities [..., N, L] after so many updates, differentiable in all that they depend on."""
    q = start(unary)
    for _ in range(iterations):
        q = step(q, unary, terms)
    return q


def infer(unary: Tensor, terms: Sequence[Term], iterations: int) -> Tensor:
    """The probabilities [N, L] after so many updates, outside of autograd."""

    def run() -> Tensor:
        q, spare = torch.empty_like(unary), torch.empty_like(unary)
        each(functools.partial(_start, unary, q, rows) for rows in chunks_of(unary.shape[0]))
        for _ in range(iterations):
            _step_by_chunks(q, unary, terms, spare)
            q, spare = spare, q
        return q

    return on_threads(unary, run)


def _start(unary: Tensor, out: Tensor, rows: slice) -> None:
    out[rows] = start(unary[rows])


def _step_by_chunks(q: Tensor, unary: Tensor, terms: Sequence[Term], out: Tensor) -> None:
    """`step` written to `out`, some pixels at a time, whose messages do not leave the cache meanwhile."""
    filters = [term.filter.passes(q) for term in terms]
    # No term waits for another.
    for stage in itertools.zip_longest(*[passes.stages for passes in filters], fillvalue=()):
        each(itertools.chain(*stage))

    def update(rows: slice) -> None:
        logits = -unary[rows]
        for term, passes in zip(terms, filters, strict=True):
            if _has_labels(term.compatibility):
                logits -= apply_compatibility(term.compatibility, passes.part(rows))
            else:
                logits.add_(passes.part(rows), alpha=float(term.compatibility))
        _softmax(logits, out[rows])

    each(functools.partial(update, rows) for rows in chunks_of(q.shape[0]))
    for passes in filters:
        passes.end()


def _softmax(logits: Tensor, out: Tensor) -> None:
    """Over the labels. Where no exponential leaves the range of numbers, without looking for the maxima."""
    torch.exp(logits, out=out)
    sums = out @ out.new_ones(out.shape[1], 1)
    low, high = torch.aminmax(sums)
    if low > _SMALL and high < 1 / _SMALL:
        out /= sums
    else:
        torch.softmax(logits, 1, out=out)


def kl_divergence(q: Tensor, unary: Tensor, terms: Sequence[Term]) -> Tensor:
    """The Kullback-Leibler divergence of q from the CRF up to the constant log Z, as densecrf counts it.

    Each pair of pixels is counted twice, and a pixel with itself. Summed in float64.
    """
    total = (q * q.clamp_min(1e-20).log()).sum(dtype=torch.float64) + (q * unary).sum(dtype=torch.float64)
    for term in terms:
        total = total + (q * apply_compatibility(term.compatibility, term.filter(q))).sum(dtype=torch.float64)
    return total


def compose(compatibility: Compatibility, weight: Compatibility) -> Compatibility:
    """The compatibility after the weight, which scales (number), or mixes (matrix), what a filter returns."""
    potts = not _has_labels(compatibility)
    if not _has_labels(weight):
        return compatibility * weight
    assert isinstance(weight, Tensor)
    if potts:
        return -compatibility * weight
    assert isinstance(compatibility, Tensor)
    if compatibility.dim() == 2:
        return compatibility @ weight if weight.dim() == 2 else compatibility * weight
    return compatibility[:, None] * weight if weight.dim() == 2 else compatibility * weight


def _has_labels(value: Compatibility) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def apply_compatibility(compatibility: Compatibility, filtered: Tensor) -> Tensor:
    if not _has_labels(compatibility):
        return -compatibility * filtered
    assert isinstance(compatibility, Tensor)
    return filtered @ compatibility.T if compatibility.dim() == 2 else filtered * compatibility
