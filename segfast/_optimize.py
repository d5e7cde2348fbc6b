"""Replacing the layers of anyone's model in one line, undoing it, and saying what was done and why."""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._fuse_pairs import find_chains, fuse_chains
from ._table import format_table
from .nn._fused_chain import chain_of, unfuse
from .nn._rules import Rule, all_rules, own_class
from .nn.separable_conv2d import DepthwiseConv2d
from .ops._backend import _KERNEL_DTYPES

# Kept in a replaced or left-out layer's __dict__: survives deepcopy and pickle, is no part of the state_dict.
_RECORD = "_segfast_optimize"
# Where weights get the layout that the kernels read without a copy.
_LAYOUT_DEVICES = ("cuda",)


@dataclass(frozen=True)
class Row:
    """One layer that `optimize` considered.

    `name` is its path in the model ("" for the model itself), `shared` its other paths if it has any.
    """

    name: str
    type: str
    replaced: bool
    reason: str
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The layers `optimize` considered. Iterates over its rows; `str()` is a table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def replaced(self) -> list[str]:
        """The names of the layers replaced."""
        return [row.name for row in self.rows if row.replaced]

    def __str__(self) -> str:
        note = "A functional call in a forward method is not replaced, and seen only where it is named there."
        if not self.rows:
            return f"No layer of a kind that segfast serves.\n{note}"
        cells = [
            (" = ".join(name or "(the model)" for name in (row.name, *row.shared)), row.type, row.reason)
            for row in self.rows
        ]
        count = f"{len(self.replaced)} of {len(self.rows)} layers replaced."
        return f"{format_table(['layer', 'type', 'replaced, or why not'], cells)}\n{count} {note}"


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Replace every layer that segfast serves; `report` says which, `restore` undoes it.

    A layer is replaced by a change of its class: parameters, buffers, hooks, state_dict keys and the links of
    an optimizer stay. Subclasses, parametrized, quantized and scripted layers are left alone. If anything was
    replaced, 4-D parameters and buffers on a GPU get the kernels' layout (channels_last), except under
    DistributedDataParallel, whose buckets are laid out already. Optimize before `torch.compile` and before
    wrapping for data-parallel training.

    A depthwise convolution is moreover fused with the batch norm, activation and 1x1 convolution that follow
    it: in an `nn.Sequential`, and, given `example_inputs`, wherever a graph of the model's forward shows them
    to follow. While that forward runs, the first of these layers computes them all and the others pass its
    result on; a forward that then calls them in another order raises a RuntimeError. Batch norm is fused in
    eval only. A layer with hooks, a parametrization or a second caller is not fused; nothing is under
    `torch.compile`, `torch.export` or a tracer, nor in a part of the model that is called by itself.

    Args:
        model: any module; one layer will do.
        example_inputs: a tensor or a tuple of the model's arguments. The model is exported and run on them,
            in eval and without gradients, and nothing stays fused that changes its outputs.
        inplace: change `model` itself; otherwise a deep copy.
        filter_fn: called with each replaceable layer's name and the layer; False leaves it alone.

    Returns:
        `model`, or its optimized copy.

    Raises:
        TypeError: `model` is not a module, or is a scripted one; `filter_fn` cannot be called;
            `example_inputs` is neither a tensor nor a tuple.
        RuntimeError: the model cannot be deep-copied; use `inplace=True`.
        Exception: the model's own, if it does not run on `example_inputs`.

    Example:
        >>> import torch, segfast
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ConvTranspose2d(8, 1, 2, stride=2))
        >>> segfast.report(segfast.optimize(net)).replaced
        ['1']
    """
    _check_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted: its code is compiled already; optimize before scripting")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable, got {type(filter_fn).__name__}")
    # Judged on the caller's own modules: filter_fn may go by identity, and nothing has changed if it raises.
    chosen: dict[str, Rule] = {}
    left_out = []
    heads = []
    for name, module in model.named_modules():
        rule, _ = _judge(module)
        if rule is None:
            known = example_inputs is None and chain_of(module) is not None
            if isinstance(module, DepthwiseConv2d) and module.activation is None and not known:
                heads.append(name)
        elif filter_fn is None or filter_fn(name, module):
            chosen[name] = rule
            if rule.target is DepthwiseConv2d:
                heads.append(name)
        else:
            left_out.append(name)
    plan = find_chains(model, example_inputs, heads)
    if not inplace:
        model = _copied(model)
    modules = dict(model.named_modules())
    for name in left_out:
        _record(modules[name])["left_out"] = True
    for name, rule in chosen.items():
        module = modules[name]
        record = _record(module)
        record.pop("left_out", None)
        record["rule"] = (rule.source, rule.target)
        vars(module).update(rule.attributes)
        module.__class__ = rule.target
    if example_inputs is not None:
        unfuse(model)
    for name, reason in fuse_chains(model, plan, example_inputs).items():
        _record(modules[name])["not_fused"] = reason
    ours = {rule.target for rule in all_rules()}
    served = any(own_class(module) in ours for module in modules.values())
    if served and not any(isinstance(m, nn.parallel.DistributedDataParallel) for m in modules.values()):
        _lay_out(modules.values())
    return model


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
    _check_model(model)
    recorded = [(name, module) for name, module in model.named_modules() if _RECORD in vars(module)]
    for name, module in recorded:
        _check_restorable(name, module)
    unfuse(model)
    for _, module in recorded:
        record = vars(module).pop(_RECORD)
        _set_layout(module, record.get("contiguous", ()), torch.Tensor.contiguous)
        if "rule" in record:
            for key in _rule(record).attributes:
                vars(module).pop(key, None)
            module.__class__ = record["rule"][0]
    return model


def report(model: nn.Module) -> Report:
    """List each layer that `optimize` considers, whether it is replaced, and if not, why.

    Works before `optimize` too, and then says what it would do.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch, segfast
        >>> for row in segfast.report(torch.nn.Sequential(torch.nn.ConvTranspose3d(8, 4, 2))):
        ...     print(row.name, row.type, row.replaced)
        0 ConvTranspose3d False
    """
    _check_model(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    rows = []
    for module, (name, *shared) in names.items():
        rule, reason = _judge(module)
        record = vars(module).get(_RECORD, {})
        if record.get("left_out"):
            reason = "left out by filter_fn"
        elif rule is not None:
            reason = f"not yet: optimize would make it {_qualified(rule.target)}"
        if reason is not None:
            reason += _fusion(name, module)
            rows.append(Row(name, _type_name(module), "rule" in record, reason, tuple(shared)))
    return Report(tuple(rows))


def _fusion(name: str, module: nn.Module) -> str:
    """What a layer is fused with, or why with nothing."""
    chain = chain_of(module)
    if chain is None:
        reason = vars(module).get(_RECORD, {}).get("not_fused")
        return "" if reason is None else f"; not fused: {reason}"
    parent = name.rpartition(".")[0]
    names = [layer.removeprefix(f"{parent}.") for layer in chain.names[1:]]
    return f"; fused with {', '.join(names)}"


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(f"the model cannot be deep-copied ({error}); use inplace=True") from error


def _judge(module: nn.Module) -> tuple[Rule | None, str | None]:
    """The rule that replaces `module`, or None and why not; (None, None) for a layer no family is about."""
    reasons = []
    for rule in all_rules():
        if own_class(module) is not rule.target and not rule.applies(module):
            continue
        if own_class(module) is rule.source:
            reason = _common_reason_not(module) or rule.reason_not(module)
            if reason is None:
                return rule, None
        else:
            reason = _other_reason_not(module, rule)
        if reason is not None and reason not in reasons:
            reasons.append(reason)
    return None, "; ".join(reasons) or None


def _common_reason_not(module: nn.Module) -> str | None:
    """What speaks against replacing a layer of a served class, whatever the family."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    weight = getattr(module, "weight", None)
    # A plain tensor where torch.nn.utils.weight_norm and the like put the weight together before each call.
    if weight is None or type(weight) not in (nn.Parameter, torch.Tensor):
        return f"its weight is a {type(weight).__name__}; optimize before sharding or quantizing"
    if weight.dtype not in _KERNEL_DTYPES:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"no kernels for {dtype} (float16, bfloat16 and float32 have them)"
    return None


def _other_reason_not(module: nn.Module, rule: Rule) -> str | None:
    """Why a layer that only resembles `rule.source` is not replaced; None if it does not resemble it."""
    kind, source = own_class(module), rule.source.__name__
    if kind is rule.target:
        return "replaced" if "rule" in vars(module).get(_RECORD, {}) else "segfast's own already"
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module.original_name == source
        return "scripted: its code is compiled already; optimize before scripting" if scripted else None
    if isinstance(module, rule.source):
        if parametrize.is_parametrized(module):
            names = ", ".join(name for name, _ in module.get_submodule("parametrizations").named_children())
            return f"parametrized ({names}); remove the parametrization or parametrize after optimize"
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return "lazy: its shapes are not known before the first call; run one batch, then optimize"
        if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
            return "sharded by itself by fully_shard; optimize before sharding"
        return f"a subclass of {source}: its forward may be its own"
    for related, reason in rule.related.items():
        if isinstance(module, related):
            return reason
    if kind.__name__ == source:
        if "quantized" in kind.__module__:
            return "quantized; the kernels take floating-point weights"
        return f"another class of that name ({_qualified(kind)})"
    if rule.functional is not None and _calls(module, rule.functional):
        return f"its forward calls {rule.functional}; write segfast.functional.{rule.functional} there"
    return None


def _calls(module: nn.Module, function: str) -> bool:
    """Whether the forward of a user's module names `function` in its own code, and means torch's."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or type(module).__module__.startswith(("torch.nn.", "segfast.")):
        return False
    names = _names(code)
    used = [forward.__globals__.get(name) for name in names]
    ours = any(
        str(getattr(value, "__module__", None) or getattr(value, "__name__", "")).split(".")[0] == "segfast"
        for value in used
    )
    return function in names and not ours


def _names(code: CodeType) -> set[str]:
    """Global and attribute names in `code` and in the functions defined inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _record(module: nn.Module) -> dict[str, Any]:
    return vars(module).setdefault(_RECORD, {})


def _rule(record: dict[str, Any]) -> Rule:
    source, target = record["rule"]
    return next(rule for rule in all_rules() if (rule.source, rule.target) == (source, target))


def _check_restorable(name: str, module: nn.Module) -> None:
    record = vars(module)[_RECORD]
    if "rule" not in record:
        return
    rule = _rule(record)
    if own_class(module) is not rule.target:
        raise ValueError(f"layer {name!r} became a {type(module).__name__} after optimize; undo that first")
    for key, neutral in rule.attributes.items():
        value = getattr(module, key)
        if value != neutral:
            raise ValueError(
                f"layer {name!r} has {key}={value!r}, set after optimize, which {rule.source.__name__} "
                f"cannot hold; set it back to {neutral!r} first"
            )


def _lay_out(modules: Any) -> None:
    """Give 4-D tensors on a GPU the kernels' layout, and note in each module's record which had another."""
    layouts = {rule.target: rule.layout for rule in all_rules() if rule.layout is not None}
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        layout = layouts.get(own_class(module), _channels_last)
        names = tuple(
            name
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if type(tensor) in (nn.Parameter, torch.Tensor)
            and tensor.device.type in _LAYOUT_DEVICES
            and tensor.dim() == 4
            and layout(tensor.data).stride() != tensor.stride()
        )
        if names:
            _set_layout(module, names, layout)
            record = _record(module)
            record["contiguous"] = tuple({*record.get("contiguous", ()), *names})


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _set_layout(
    module: nn.Module, names: tuple[str, ...], layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Change the layout under the same Parameter objects, as `Module.to(memory_format=...)` does."""
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        tensor.data = layout(tensor.data)
        if tensor.grad is not None:
            tensor.grad.data = layout(tensor.grad.data)


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _type_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"scripted {module.original_name}"
    return own_class(module).__name__
