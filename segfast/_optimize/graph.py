"""The graph of a model's forward: the evidence for fusing layers that no Sequential calls.

The forward is run once, while every function of torch that it calls is listed. What follows a question for
values in it may be something else for others.
"""

import gc
import hashlib
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..nn._fused.sequence import fusing
from ..ops import backend
from .verify import cloned, running_mode, undisturbed

# Functions that hand out values, and call no operator that says so.
_VALUES = ("numpy", "tolist", "array", "dlpack", "data_ptr")
_ASK = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Node:
    """One operation: who reads its results, what it reads, and the modules in whose call it is.

    `stack` has the modules' paths, the innermost last, each with a number of the call. The result of one that
    `asks` tells values, and what follows may be something else for others.
    """

    __slots__ = ("asks", "inputs", "name", "of_values", "stack", "users")

    def __init__(self, name: str, inputs: Iterable["Node"], stack: tuple[tuple[str, Any], ...] = ()) -> None:
        self.name, self.stack = name, stack
        self.inputs = set(inputs)
        self.users: dict[Node, None] = {}
        self.asks = False
        self.of_values: bool = any(node.of_values for node in self.inputs)  # those of inputs or weights
        for node in self.inputs:
            node.users[self] = None


class Graph:
    """Who computes what from what in the model's forward.

    `digest` tells one forward from another, with all but the values of inputs and weights; None where the
    forward depends on these.

    Raises:
        Exception: the model's own, if it does not run.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any], training: bool):
        with undisturbed(model), running_mode(model, training):
            nodes, self.digest = _listed(model, cloned(inputs))
        self.nodes: dict[str, set[Node]] = {}
        self.calls: dict[str, set[Any]] = {}
        for node in nodes:
            for path, number in node.stack:
                self.nodes.setdefault(path, set()).add(node)
                self.calls.setdefault(path, set()).add(number)

    def output(self, name: str) -> Node | None:
        """The one result that leaves the one call of a module."""
        inside = self.nodes.get(name, set())
        leaving = [node for node in inside if not node.users.keys() <= inside]
        return leaving[0] if len(leaving) == 1 and len(self.calls[name]) == 1 else None

    def inputs(self, name: str) -> set[Node]:
        """The tensors that a module reads and did not compute, but for weights."""
        inside = self.nodes.get(name, set())
        return {node for n in inside for node in n.inputs} - inside

    def reader(self, output: Node) -> tuple[str, str]:
        """The one module that reads `output`, and nothing else; or why there is none."""
        stacks = [user.stack for user in output.users]
        if not stacks or not all(stacks):
            return "", "it is a result of the model"
        name = stacks[0][-1][0]
        if any(user not in self.nodes[name] for user in output.users):
            return "", "its result is used more than once"
        if len(self.calls[name]) > 1:
            return "", f"{name} is not called exactly once"
        asking = [node.name for node in self.inputs(name) if node.asks]
        if asking:
            return "", f"{asking[0]} asks for values"
        if self.inputs(name) != {output}:
            return "", f"{next(iter(output.users)).name} follows"
        return name, ""


Listed = tuple[list[Node], str | None]


def _listed(model: nn.Module, inputs: Any) -> Listed:
    """The operations of a forward, and their digest."""
    args, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    listing = _Listing(model, _tensors(inputs))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(backend("aten"))
        stack.enter_context(fusing(False))
        # What scripted code compiles for itself, nobody would see.
        stack.enter_context(torch.jit.optimized_execution(False))
        stack.enter_context(listing.of_modules())
        stack.enter_context(listing.operators)
        stack.enter_context(listing)
        outputs = model(*args, **named)
    return listing.ended(outputs)


def _asks(function: Any, args: tuple[Any, ...]) -> bool:
    """True if the result of an operator, or its size, tells values."""
    if function.overloadpacket is torch.ops.aten.index:
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:]))
    return bool(_ASK & set(function.tags))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a structure that pytree knows."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _without_vmap(t: Tensor) -> Tensor:
    """The tensor that `torch.vmap` hands to a function as a `t` of fewer dimensions."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def _written_by(function: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> list[StorageWeakRef]:
    """The memory that an operator says it writes to."""
    arguments = function._schema.arguments
    given = [(argument, value) for argument, value in zip(arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
    return [
        StorageWeakRef(t.untyped_storage())
        for argument, value in given
        if argument.alias_info is not None and argument.alias_info.is_write
        for t in _tensors(value)
        if t.layout == torch.strided
    ]


class _Operators(TorchDispatchMode):
    """Tells of operators that no function of torch has asked for: scripted code's."""

    def __init__(self, on_unseen: Callable[..., None]) -> None:
        super().__init__()
        self.calls = 0  # of such functions that run now
        self.written: list[StorageWeakRef] = []
        self.asks = False  # one of them gives what only values tell
        self._on_unseen = on_unseen

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to keep torch's compiler from this class, torch would import it, which takes a second."""
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        self.written += _written_by(function, args, kwargs)
        self.asks |= _asks(function, args)
        if not self.calls:
            self._on_unseen(function.overloadpacket, args, kwargs, result)
        return result


class _Listing(TorchFunctionMode):
    """Lists the functions that are called in a forward, and which tensors they hand to one another."""

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.operators = _Operators(self._add_call)
        self._thread = threading.get_ident()
        self._nodes: list[Node] = []
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._stack: list[tuple[str, int]] = []
        self._count = 0
        self._owned = {id(t): n for n, t in enumerate((*model.parameters(), *model.buffers()))}
        self._lines: list[str] | None = [_described(t) for t in (*model.parameters(), *model.buffers())]
        # The last to make a tensor, and to write its memory.
        self._made = WeakTensorKeyDictionary()
        self._written: dict[StorageWeakRef, int] = {}
        self._question: Node | None = None
        for t in inputs:
            self._add(Node("input", ()), (t,))
            self._nodes[-1].of_values = True
            self._lines.append(_described(t))

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operators.calls += 1
        self.operators.asks = getattr(function, "__name__", "").strip("_") in _VALUES
        self.operators.written.clear()
        try:
            result = function(*args, **kwargs)
            self._add_call(function, args, kwargs, result)
        finally:  # a digest is made by functions of torch too
            self.operators.calls -= 1
        return result

    def _add_call(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Add what a function or an operator made, and who made what it read."""
        operators = self.operators
        asks, writes = operators.asks, list(operators.written)
        operators.asks = False
        operators.written.clear()
        read, made = _tensors((args, kwargs)), _tensors(result)
        name = getattr(function, "__name__", str(function)).strip("_")
        made += read[:1] if name == "set" else []  # an attribute of it, `data` say
        if not (made or writes or asks):
            return
        inputs = [node for node in map(self._origin, read) if node is not None]
        of_values = any(node.of_values for node in inputs) or any(id(t) in self._owned for t in read)
        if asks and of_values:
            # What is there now may be read by what would follow for other values, which would make all else.
            inputs += self._made_before()
            self._lines = None
        if self._question is not None:
            inputs.append(self._question)
        self._describe(f"{getattr(function, '__module__', '')}.{name}", args, kwargs)
        node = Node(name, inputs, tuple(self._stack))
        node.of_values = of_values
        self._add(node, made, writes)
        if asks and of_values:
            node.asks, self._question = True, node

    def _add(self, node: Node, made: Iterable[Tensor], writes: Iterable[StorageWeakRef] = ()) -> None:
        for t in map(_without_vmap, made):
            self._made[t] = len(self._nodes)
        for memory in writes:
            self._written[memory] = len(self._nodes)
        self._nodes.append(node)

    def _made_before(self) -> list[Node]:
        """The nodes of the tensors that there still are, but for weights."""
        alive = [t for t in self._made if id(t) not in self._owned]
        return [node for node in map(self._origin, alive) if node is not None and node.inputs]

    def _describe(self, name: str, args: Any, kwargs: Any) -> None:
        """Add a line about a call: what it was given, tensors by where they are from."""
        if self._lines is not None:
            leaves, structure = _pytree.tree_flatten((args, kwargs))
            given = [self._place(each) if isinstance(each, Tensor) else _whole(each) for each in leaves]
            self._lines.append(f"{self._stack[-1:]} {name} {structure} {given}")

    def _place(self, t: Tensor) -> str:
        last = self._last(t)
        return f"{last} {_described(t)}" if last >= 0 else f"weight {self._owned.get(id(t))}"

    def _last(self, t: Tensor) -> int:
        t = _without_vmap(t)
        memory = StorageWeakRef(t.untyped_storage()) if t.layout == torch.strided else None
        return max(self._made.get(t, -1), self._written.get(memory, -1) if memory is not None else -1)

    def _origin(self, t: Tensor) -> Node | None:
        """The node that computed `t`; None of a weight."""
        t = _without_vmap(t)
        last = self._last(t)
        if last < 0 and id(t) not in self._owned:
            self._add(Node("a constant", ()), (t,))
            last = len(self._nodes) - 1
            if self._lines is not None:
                self._lines.append(f"{_described(t)} {digest_of_values(t)}")
        return self._nodes[last] if last >= 0 else None

    def of_modules(self) -> ExitStack:
        """While this is entered, calls of modules are listed too."""
        modules = nn.modules.module
        stack = ExitStack()
        for handle in (
            modules.register_module_forward_pre_hook(self._enter),
            modules.register_module_forward_hook(self._leave, always_call=True),
        ):
            stack.callback(handle.remove)
        return stack

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread:
            self._count += 1
            self._stack.append((self._paths.get(id(module), f"a {type(module).__name__}"), self._count))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._stack.pop()

    def ended(self, outputs: Any) -> Listed:
        """All that was listed, and its digest; somebody reads the outputs, and what else the model keeps."""
        read = [self._origin(t) for t in _tensors(outputs)]
        self._describe("output", (outputs,), {})
        # In an attribute of the model, in an object that no pytree knows.
        if any(node not in read for node in self._made_before()):
            gc.collect()
        read += self._made_before()
        self._nodes.append(Node("output", filter(None, read)))
        lines = None if self._lines is None else "\n".join(self._lines)
        return self._nodes, None if lines is None else hashlib.sha256(lines.encode()).hexdigest()


def _described(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} {list(t.stride())}"


def _whole(value: Any) -> str:
    """A text that tells `value` from others; NumPy's own leaves out what is in the middle of large arrays."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)


def digest_of_values(t: Tensor) -> str:
    """A digest of the values of a tensor."""
    values = t.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    values = values if values.stride() == (1,) else values.clone(memory_format=torch.contiguous_format)
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
