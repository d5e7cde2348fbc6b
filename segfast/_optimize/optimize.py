"""Replacing the layers of anyone's model in one line, and undoing it."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..nn._fused.folding import forget
from ..nn._fused.layers import is_convolution, is_depthwise
from ..nn._fused.ready import forget_ready
from ..nn._fused.sequence import sequence_of
from ..nn._fused.whole_model import (
    compute_as_given,
    compute_in,
    compute_on_aten,
    keep_contiguous,
)
from ..nn._rules import Rule, all_rules, own_class
from ..nn.conv2d import Conv2d
from ..ops import _measure
from .eligible import RECORD, check_model, common_reason_not, record_of, rule_for, rule_of
from .fuse import Fusions, find_fusions, fuse, undo, undo_what_changes_outputs
from .gain import Gain, gain
from .layouts import all_channels_last, lay_out, set_layout
from .measure import choose, device_of, is_measured_on_gpu
from .outcome import Outcome, outcome_of
from .report import Report, Row, report
from .verify import Inputs, arguments, first_line, run_once

__all__ = ["Report", "Row", "optimize", "report", "restore"]


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    dtype: torch.dtype | None = None,
    budget: float = 60.0,
    progress: bool = True,
    train: bool = False,
) -> nn.Module:
    """Replace every layer that segfast serves; `report` says which, `restore` undoes it.

    Given `example_inputs`, the model is run on them, and for each call that its layers make the
    implementations that could serve it (ATen, our own, on a CPU oneDNN's fused calls with packed weights, on
    a GPU cuDNN's fused calls and our kernels with several tile sizes) are checked against exact arithmetic
    and timed; the fastest runs from then on, on a CPU wherever nothing needs a gradient. What was measured is
    remembered in the user's cache (`SEGFAST_CACHE`), so that it is measured once on a machine. On a GPU the
    kernels are proven first, once, and all is compiled and timed in processes of their own. At the end the
    whole model is timed before and after; if it is not faster it is left as it was, which `report` says.

    A layer is replaced by a change of its class: parameters, buffers, hooks, state_dict keys and the links of
    an optimizer stay. Subclasses, parametrized, quantized and scripted layers are left alone. Given
    `example_inputs`, weights on a GPU are made channels_last, but for those under DistributedDataParallel,
    whose buckets are laid out already. Optimize before `torch.compile` and before wrapping for data-parallel
    training.

    A convolution, transposed or not, is moreover fused with the batch norm and activation that follow it, a
    depthwise one also with the 1x1 convolution after them: in an `nn.Sequential`, and, given
    `example_inputs`, wherever a graph of the model's forward shows them to follow. While that forward runs,
    the first of these layers computes them all and the others pass its result on; a forward that then calls
    them in another order raises a RuntimeError. Batch norm is fused in eval and, with `train`, in
    training. A layer with hooks, a parametrization or a second caller is not fused; nothing is under
    `torch.compile`, `torch.export` or a tracer, nor in a part of the model that is called by itself.

    The ASPPs of torchvision, segmentation_models_pytorch and mmseg are each fused into a few operators in
    eval without gradients; given `example_inputs`, so are classes of the same structure. The residual blocks
    of torchvision's ResNets, which smp has too, are in eval one operator per convolution, the norm, addition
    and ReLU after it included.

    Args:
        model: any module; one layer will do.
        example_inputs: a tensor, a tuple of the model's positional arguments (a dict in it is one), or a dict
            of its keyword arguments. The model is traced and run on them, in eval and without
            gradients, and nothing stays fused that changes its outputs.
        inplace: change `model` itself; otherwise a deep copy.
        filter_fn: called with the name of each layer that may be replaced or begin something fused, and the
            layer; False leaves it alone.
        dtype: torch.bfloat16 to compute in that dtype in eval and without gradients: parameters, inputs and
            outputs stay as they are, norms are folded before anything is rounded, and `report` tells by how
            much the outputs changed. Kept only where it is faster.
        budget: seconds to spend on measuring at most; calls that do not fit, the smallest, stay ATen's.
        progress: show a bar on a terminal while measuring.
        train: keep less for the backward pass: wherever a convolution stays fused with its batch norm and
            activation in eval, the norm and the activation are one function in training, for which the
            activation is not kept but made again (see `segfast.nn.ConvBNAct`). On a GPU also measure the
            calls of a training step, and time one before and after: on a CPU only ATen's have gradients.

    Returns:
        `model`, or its optimized copy.

    Raises:
        TypeError: `model` is not a module, or is a scripted one; `filter_fn` cannot be called;
            `example_inputs` is neither a tensor, a tuple nor a dict.
        ValueError: `budget` is not positive; another `dtype`, or one without `example_inputs`; the model is
            on several devices and `example_inputs` are given; `train`, and no output needs a gradient.
        RuntimeError: the model cannot be deep-copied; use `inplace=True`.
        Exception: the model's own, if it does not run on `example_inputs`.

    Example:
        >>> import torch, segfast
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ConvTranspose2d(8, 1, 2, stride=2))
        >>> segfast.report(segfast.optimize(net)).replaced
        ['1']
    """
    check_model(model)
    _check_options(model, example_inputs, filter_fn, dtype, budget)
    # Judged on the caller's own modules: filter_fn may go by identity, and nothing has changed if it raises.
    chosen: dict[str, Rule] = {}
    left_out = []
    heads = []
    for name, module in model.named_modules():
        rule, _ = rule_for(module)
        known = example_inputs is None and sequence_of(module) is not None
        if rule is None and (known or not _can_begin_sequence(module)):
            continue
        if filter_fn is None or filter_fn(name, module):
            heads.append(name)
            if rule is not None:
                chosen[name] = rule
        elif rule is not None:
            left_out.append(name)
    fusions = find_fusions(model, example_inputs, heads, filter_fn)
    if not inplace:
        model = _copied(model)
    wholes = tuple(f"{name}." for name in (*fusions.known, *fusions.unknown))
    dense = [n for n in heads if n not in chosen and not n.startswith(wholes)]
    try:
        if example_inputs is None:
            _replace(model, chosen, left_out, fusions, train)
            return model
        inputs = arguments(example_inputs)
        # On a CPU outputs are compared once, when it is chosen what runs. Where nothing is timed, or outputs
        # differ, all is done again, and what changes outputs is found before choosing.
        device = device_of(model, inputs)
        on_cpu = device is not None and device.type == "cpu"
        later = fusions.fuses() and on_cpu and dtype is None
        outcome = outcome_of(model, fusions, list(chosen), dense, dtype) if on_cpu else None
        for compared in (False, True) if later else (True,):
            undo(model)
            _replace(model, chosen, left_out, fusions, train, inputs if compared else None)
            if _is_served(model) and not is_measured_on_gpu(model, inputs):  # else once it is chosen
                lay_out(model, inputs)
            found = _choose(model, inputs, dense, dtype, budget, progress, train, not compared, outcome)
            if found is not None and found.error <= found.allowed:
                break
            outcome = None
    except BaseException:
        restore(model)
        raise
    return model


def _replace(
    model: nn.Module,
    chosen: dict[str, Rule],
    left_out: Sequence[str],
    fusions: Fusions,
    train: bool,
    inputs: Inputs | None = None,
) -> None:
    """Replace the layers `chosen` and fuse `fusions`; given `inputs`, only those that change no output.

    With `train` what is fused keeps less in training.
    """
    modules = dict(model.named_modules())
    for name in left_out:
        record_of(modules[name])["left_out"] = True
    for name, rule in chosen.items():
        module = modules[name]
        record = record_of(module)
        record.pop("left_out", None)
        record["rule"] = (rule.source, rule.target)
        module.__dict__.update(rule.attributes)
        module.__class__ = rule.target
    fuse(model, fusions, train)
    reasons = fusions.reasons
    if inputs is not None:
        vars(model).get(RECORD, {}).pop("not_fused", None)
        reasons = undo_what_changes_outputs(model, fusions, inputs)
    for name, reason in reasons.items():
        record_of(modules[name])["not_fused"] = reason


def _is_served(model: nn.Module) -> bool:
    ours = {rule.target for rule in all_rules()}
    return any(own_class(m) in ours or type(m) is not own_class(m) for m in model.modules())


def _check_options(
    model: nn.Module,
    example_inputs: Any,
    filter_fn: Callable[[str, nn.Module], bool] | None,
    dtype: torch.dtype | None,
    budget: float,
) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted: its code is compiled already; optimize before scripting")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable, got {type(filter_fn).__name__}")
    if not (isinstance(budget, int | float) and 0 < budget < math.inf):
        raise ValueError(f"budget must be a positive number of seconds, got {budget!r}")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype must be None or torch.bfloat16, got {dtype!r}")
    if example_inputs is None:
        if dtype is not None:
            raise ValueError("dtype needs example_inputs, on which the gain and the error are measured")
        return
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(f"model must be on one device to be measured, got {', '.join(sorted(devices))}")


def _choose(
    model: nn.Module,
    inputs: Inputs,
    names: Sequence[str],
    dtype: torch.dtype | None,
    budget: float,
    progress: bool,
    train: bool,
    fused: bool,
    outcome: Outcome | None,
) -> Gain | None:
    """Choose what runs the calls of `model`; undo what was done to it where it is not faster for it.

    `names` are of convolutions that no rule is about. They become ours too where something else than ATen is
    chosen for them. With `fused` outputs are yet to be compared. Returns None where nothing was timed; a
    model whose `outcome` is known is not timed again.
    """
    device = device_of(model, inputs)
    on_gpu = is_measured_on_gpu(model, inputs)
    train = train and on_gpu
    if device is None or (device.type == "cuda" and not on_gpu):
        if dtype is not None:
            compute_in(model, dtype)
        return None
    known = None if outcome is None else outcome.recall(model)
    try:
        plain = restore(_copied(model, device.type == "cpu")) if known is None else model
    except RuntimeError:
        return None  # inplace: without a copy nothing can be compared
    dense = [model.get_submodule(name) for name in names]
    _make_ours(dense)
    if dtype is not None:
        compute_in(model, dtype)
    try:
        if on_gpu:
            all_channels_last(model)
        end = time.perf_counter() + budget
        was_quiet = _measure.quiet_check()
        found = known or _measured(model, plain, inputs, dense, dtype, end, progress, train, fused)
        calls = vars(model).get(RECORD, {}).pop("calls", ())
        if outcome is not None and known is not None:
            outcome.note(model)
            _give_back(dense, model)
            outcome.lay_out(model)
        elif outcome is not None and found is not None:
            outcome.keep(model, found, calls, was_quiet())
    except BaseException as error:
        _leave(model, "as given")
        if not isinstance(error, RuntimeError):
            raise
        run_once(plain, inputs)
        record_of(model)["not_fused"] = f"undone: {first_line(error)}"
        return None
    if found is None:
        return None
    if not found.kept:
        slower = vars(model).get(RECORD, {}).get("slower")
        _leave(model, found.layout)
        if slower is not None:
            record_of(model)["slower"] = slower
    record_of(model)["gain"] = found
    return found


def _make_ours(dense: Sequence[nn.Module]) -> None:
    """Let our operator compute torch's convolutions, so that something can be chosen for them."""
    for module in dense:
        if type(module) is nn.Conv2d:
            record_of(module)["rule"] = (nn.Conv2d, Conv2d)
            module.__class__ = Conv2d


def _give_back(dense: Sequence[nn.Module], model: nn.Module) -> None:
    """Let torch's own class compute again what ATen was chosen for, but for `model` itself.

    Layers that were built as ours stay ours. The layout of weights stays.
    """
    for module in dense:
        record = vars(module).get(RECORD, {})
        replaced = type(module) is Conv2d and "rule" in record and module is not model
        if replaced and all(name.startswith("aten") for name in record.get("choices", ())):
            del record["rule"]
            record.pop("choices", None)
            module.__class__ = nn.Conv2d


def _leave(model: nn.Module, layout: str) -> None:
    """Undo what was done to `model`, which was not faster for it, but for a layout that was."""
    last = vars(model).get(RECORD, {}).get("last", ())
    restore(model)
    if layout == "channels_last" and all_channels_last(model):
        keep_contiguous(model, *map(model.get_submodule, last))
    if any(own_class(m).__module__.startswith("segfast.") for m in model.modules()):
        compute_on_aten(model)


def _measured(
    model: nn.Module,
    plain: nn.Module,
    inputs: Inputs,
    dense: Sequence[nn.Module],
    dtype: torch.dtype | None,
    end: float,
    progress: bool,
    train: bool,
    fused: bool = False,
) -> Gain | None:
    """Choose until `end`, and what it gained; None where there is nothing to choose."""
    left = choose(model, inputs, end - time.perf_counter(), progress, train)
    _give_back(dense, model)
    # On a GPU filters have got another layout, which is to pay too.
    laid_out = any(p.is_cuda and p.dim() == 4 for p in model.parameters())
    if left is None and dtype is None and not laid_out:
        return None
    lay_out(model, inputs)
    found = dataclasses.replace(gain(model, plain, inputs, dtype, train, fused), unmeasured=left or 0)
    if found.kept or dtype is None:
        return found
    compute_as_given(model)
    _make_ours(dense)
    record_of(model)["slower"] = found
    return _measured(model, plain, inputs, dense, None, end, progress, train)


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize` in place: classes, fusion, the layout of what it made channels_last. Returns `model`.

    Layers built as segfast's from the start stay.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a replaced layer has since been given something torch's own class cannot hold (an
            activation, a parametrization); nothing has been changed.

    Example:
        >>> import torch, segfast
        >>> up = segfast.optimize(torch.nn.ConvTranspose2d(8, 4, 2, stride=2))
        >>> type(segfast.restore(up)) is torch.nn.ConvTranspose2d
        True
    """
    check_model(model)
    recorded = [(name, module) for name, module in model.named_modules() if RECORD in vars(module)]
    for name, module in recorded:
        _check_restorable(name, module)
    undo(model)
    forget(*model.modules())
    forget_ready(model)
    for _, module in recorded:
        record = vars(module).pop(RECORD)
        set_layout(module, record.get("contiguous", ()), torch.Tensor.contiguous)
        if "rule" in record:
            for key in rule_of(record).attributes:
                vars(module).pop(key, None)
            module.__class__ = record["rule"][0]
    return model


def _can_begin_sequence(module: nn.Module) -> bool:
    """True if a convolution that no rule is about may be fused with what follows it."""
    ours = own_class(module) not in (nn.Conv2d, nn.ConvTranspose2d)
    return is_convolution(module) and (ours or not (is_depthwise(module) or common_reason_not(module)))


def _copied(model: nn.Module, sharing: bool = False) -> nn.Module:
    """A deep copy; `sharing` the weights, but for those whose layout is to be another one."""
    again = {m for m in model.modules() if vars(m).get(RECORD, {}).get("contiguous")} if sharing else set()
    weights = [p for m in model.modules() if m not in again for p in m._parameters.values() if sharing]
    try:
        return copy.deepcopy(model, {id(p): p for p in weights})
    except Exception as error:
        raise RuntimeError(f"the model cannot be deep-copied ({error}); use inplace=True") from error


def _check_restorable(name: str, module: nn.Module) -> None:
    record = vars(module)[RECORD]
    if "rule" not in record:
        return
    rule = rule_of(record)
    if own_class(module) is not rule.target:
        raise ValueError(f"layer {name!r} became a {type(module).__name__} after optimize; undo that first")
    for key, neutral in rule.attributes.items():
        value = getattr(module, key)
        if value != neutral:
            raise ValueError(
                f"layer {name!r} has {key}={value!r}, set after optimize, which {rule.source.__name__} "
                f"cannot hold; set it back to {neutral!r} first"
            )
