"""The rule that replaces a layer, or why there is none; and what was noted of it when it was replaced."""

import inspect
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..nn._rules import RECORD, Rule, all_rules, own_class
from ..ops._backend import _KERNEL_DTYPES


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def rule_for(module: nn.Module) -> tuple[Rule | None, str | None]:
    """The rule that replaces `module`, or None and why not; (None, None) for a layer no family is about."""
    reasons = []
    for rule in all_rules():
        if own_class(module) is not rule.target and not rule.applies(module):
            continue
        if own_class(module) is rule.source:
            reason = common_reason_not(module) or rule.reason_not(module)
            if reason is None:
                return rule, None
        else:
            reason = _other_reason_not(module, rule)
        if reason is not None and reason not in reasons:
            reasons.append(reason)
    return None, "; ".join(reasons) or None


def common_reason_not(module: nn.Module) -> str | None:
    """The reason not to replace a layer of a served class, whatever the family; None if there is none."""
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
    if kind in {other.target for other in all_rules()}:
        return "replaced" if "rule" in vars(module).get(RECORD, {}) else "segfast's own already"
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
        return f"another class of that name ({qualified(kind)})"
    if rule.functional is not None and _calls(module, rule.functional):
        return f"its forward calls {rule.functional}; write segfast.functional.{rule.functional} there"
    return None


def _calls(module: nn.Module, function: str) -> bool:
    """True if the forward of a user's module names `function` in its own code, and means torch's."""
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


def record_of(module: nn.Module) -> dict[str, Any]:
    return vars(module).setdefault(RECORD, {})


def rule_of(record: dict[str, Any]) -> Rule:
    source, target = record["rule"]
    return next(rule for rule in all_rules() if (rule.source, rule.target) == (source, target))


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def type_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"scripted {module.original_name}"
    return own_class(module).__name__
