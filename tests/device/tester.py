"""Holds an operation on a device, its values and all gradients, to fp64 by what the format can do.

ATen is no measure here: on the simulated device it computes on the CPU, in other formats than cuDNN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import segfast
from segfast.kernels._launch import _LAUNCHES

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
# Rounding the operands of a product to TF32 changes it by 2 * 2**-11; summing a few thousand terms in fp32 by
# some 2**-18 of their magnitudes.
PRODUCT = {"bfloat16": 0.0, "float16": 0.0, "tf32": 2**-10, "float32": 0.0}
SUM = 2**-18

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """An operation as users call it, beside the same in PyTorch's operations.

    Both take the tensors by name and an activation, and return one result or several. Without an activation,
    `plain` is a polynomial in its tensors: of absolute values, it is what errors are measured by.
    """

    ours: Callable
    plain: Callable
    shapes: dict[str, tuple[int, ...]]
    layouts: dict[str, str]
    activation: str | None = None
    roundings: int = 0  # of intermediate results, to the operands' dtype


def check(case: Case, arithmetic: str, device: torch.device, seed: int = 0) -> None:
    """Call twice, with other values elsewhere in the same layout: the second launches what is remembered."""
    check_once(case, arithmetic, device, seed)
    launches = dict(_LAUNCHES)
    check_once(case, arithmetic, device, seed + 1)
    assert launches, "no kernel of ours was launched"
    assert launches == _LAUNCHES, "the second call planned its launches anew"


def check_once(case: Case, arithmetic: str, device: torch.device, seed: int) -> None:
    dtype = DTYPES[arithmetic]
    values = draw(case.shapes, dtype, seed)
    linear = outputs(case.plain({name: value.double() for name, value in values.items()}, None))
    grads = draw({str(i): tuple(y.shape) for i, y in enumerate(linear)}, dtype, seed + 100)
    # A gradient jumps where an activation has a kink: nothing comes back from nearby.
    sizes = {name: value.double().abs() for name, value in values.items()}
    (largest,) = {max(y.abs().amax().item() for y in outputs(case.plain(sizes, None)))}
    near = (PRODUCT[arithmetic] + SUM + case.roundings * torch.finfo(dtype).eps) * largest
    if case.activation is not None:
        for grad, z in zip(grads.values(), linear, strict=True):
            grad[(z.abs() <= near) | ((z - 6).abs() <= near + 0.1) | ((z.abs() - 3).abs() <= near + 0.1)] = 0

    magnitude = reference_of(case._replace(activation=None), sizes, {k: g.abs() for k, g in grads.items()})
    reference = reference_of(case, values, grads)
    actual = result_of(case, values, grads, device)
    assert actual.keys() == reference.keys()
    for name, result in actual.items():
        roundings = case.roundings + ("grad" in name)
        compare(name, result, reference[name], magnitude[name], arithmetic, roundings)


def check_rounding_to_tf32(case: Case, device: torch.device, seed: int = 0) -> None:
    """The errors of sums of positive products have no mean, to a share of 2**-14.

    Rounded to the nearest TF32, an operand is as often larger as it is smaller. Its last bits dropped, it is
    smaller by a share of 2**-11.5, and so is every product.
    """
    case = case._replace(activation=None)
    values = {name: value.abs() for name, value in draw(case.shapes, torch.float32, seed).items()}
    results = outputs(case.plain(values, None))
    grads = draw({str(i): tuple(y.shape) for i, y in enumerate(results)}, torch.float32, seed + 100)
    grads = {name: grad.abs() for name, grad in grads.items()}
    reference = reference_of(case, values, grads)
    for name, result in result_of(case, values, grads, device).items():
        sums = reference[name]
        share = ((result.detach().cpu().double() - sums).sum() / sums.sum()).item()
        assert abs(share) <= 2**-14, f"{name}: all in all too large by a share of {share:.2g}"


def reference_of(case: Case, values: Tensors, grads: Tensors) -> Tensors:
    """`plain` in fp64."""
    wide, wide_grads = ({name: t.double() for name, t in tensors.items()} for tensors in (values, grads))
    return with_gradients(case.plain, wide, wide_grads, case.activation)


def result_of(case: Case, values: Tensors, grads: Tensors, device: torch.device) -> Tensors:
    """`ours` on our kernels, of tensors in the layouts of the case."""
    placed = {name: place(t.to(device), case.layouts.get(name, "")) for name, t in values.items()}
    layout = case.layouts.get("grad", "")
    on_device = {k: place(g.to(device), layout) for k, g in grads.items()}
    with segfast.backend("triton"):
        return with_gradients(case.ours, placed, on_device, case.activation)


def compare(
    name: str, actual: Tensor, reference: Tensor, magnitude: Tensor, arithmetic: str, roundings: int = 0
) -> None:
    """Element by element: one rounding of the result, and a share of the magnitude of what was summed."""
    assert actual.shape == reference.shape, f"{name}: {tuple(actual.shape)}, not {tuple(reference.shape)}"
    eps = torch.finfo(DTYPES[arithmetic]).eps
    error = (actual.detach().cpu().double() - reference).abs()
    share = PRODUCT[arithmetic] + SUM + roundings * eps
    allowed = torch.finfo(actual.dtype).eps * reference.abs() + share * magnitude.abs()
    allowed += torch.finfo(actual.dtype).tiny
    wrong = ~(error <= allowed)  # NaN is wrong too
    if wrong.any():
        excess = (error / allowed).nan_to_num(nan=torch.inf)
        place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name} in {arithmetic}: {int(wrong.sum())} of {wrong.numel()} elements wrong, the worst at "
            f"{place}: {actual[place].item():.6g}, expected {reference[place].item():.6g} "
            f"within {allowed[place].item():.2g}"
        )


def with_gradients(function: Callable, tensors: Tensors, grads: Tensors, activation: str | None) -> Tensors:
    """{"output 0": ..., "grad of NAME": ...}; each tensor a leaf in its own layout."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    results = outputs(function(leaves, activation))
    given = [g.to(y.dtype) for y, g in zip(results, grads.values(), strict=True)]
    found = torch.autograd.grad(results, list(leaves.values()), given)
    named = {f"output {i}": y.detach() for i, y in enumerate(results)}
    return named | {f"grad of {name}": g for name, g in zip(leaves, found, strict=True)}


def outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> Tensors:
    """Normal numbers that `dtype` has, those of a weight [O, I, H, W] as small as keeps sums near 1."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=generator)
        if name.startswith("weight"):
            t /= max(1, t[0].numel()) ** 0.5
        result[name] = t.to(dtype)
    return result


def place(t: Tensor, layout: str) -> Tensor:
    """`t` elsewhere in memory, amid NaN, in a layout named below; "" is channels_last or contiguous."""
    order = (0, 2, 3, 1) if t.dim() == 4 and layout != "NCHW" else tuple(range(t.dim()))
    values = t.permute(order)
    front, back = [0] * t.dim(), [0] * t.dim()
    if layout == "wide":  # some channels of more: strides that are odd
        front[-1], back[-1] = 1, 2
    elif layout == "wide16":  # aligned strides, and pointers
        front[-1], back[-1] = 16, -t.shape[1] % 16
    elif layout == "crop":  # the middle of a larger image
        front[1:3] = back[1:3] = [1, 1]
    sizes = [f + n + b for f, n, b in zip(front, values.shape, back, strict=True)]
    count = 1
    for n in sizes:
        count *= n
    off = layout == "off16"  # pointers that are not aligned
    buffer = torch.full((count + off,), float("nan"), dtype=t.dtype, device=t.device)[off:].view(sizes)
    for axis, (start, n) in enumerate(zip(front, values.shape, strict=True)):
        buffer = buffer.narrow(axis, start, n)
    buffer.copy_(values)
    return buffer.permute([order.index(axis) for axis in range(t.dim())])
