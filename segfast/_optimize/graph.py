"""The graph of a model's forward: the evidence for fusing layers that no Sequential calls.

The forward is run on a copy of the model whose tensors have shapes but no values, while every function of
torch that it calls is listed. A forward that asks for values is exported instead, which takes longer.
"""

import copy
import gc
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn._fused.sequence import fusing
from ..ops import backend
from .verify import cloned, running_mode, undisturbed


class Node:
    """One operation: who reads its results, what it reads, and the modules in whose call it is.

    `stack` has the modules' paths, the innermost last, each with a number of the call.
    """

    __slots__ = ("inputs", "name", "stack", "users")

    def __init__(self, name: str, inputs: Iterable["Node"], stack: tuple[tuple[str, Any], ...] = ()) -> None:
        self.name, self.stack = name, stack
        self.inputs = set(inputs)
        self.users: dict[Node, None] = {}
        for node in self.inputs:
            node.users[self] = None


class Graph:
    """Who computes what from what in the model's forward.

    `digest` tells one forward from another, with all but the values of inputs and weights; None where not
    all of a forward was listed.

    Raises:
        Exception: the model's own, or torch's, where it can be neither listed nor exported.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any], training: bool):
        self.digest: str | None = None
        try:
            nodes, self.digest = _listed(model, inputs, training)
        except Exception:  # it asks for values
            nodes = _exported(model, inputs, training)
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
        if self.inputs(name) != {output}:
            return "", f"{next(iter(output.users)).name} follows"
        return name, ""


def _listed(model: nn.Module, inputs: Any, training: bool) -> tuple[list[Node], str | None]:
    """The operations of a forward and their digest, by running a copy without values."""
    # A hook may know the caller's own model, which is no copy.
    with undisturbed(model), torch.inference_mode(False), torch.no_grad(), backend("aten"):
        memo: dict[int, Any] = {id(t): _without_values(t) for t in (*model.parameters(), *model.buffers())}
        bare = copy.deepcopy(model, memo).train(training)
        given = _pytree.tree_map_only(Tensor, _without_values, inputs)
        args, named = ((), given) if isinstance(given, dict) else (given, {})
        listing = _Listing(bare, _tensors(given))
        with fusing(False), listing.of_modules(), listing.unseen, listing:
            outputs = bare(*args, **named)
    return listing.ended(outputs)


def _without_values(t: Tensor) -> Tensor:
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
        raise TypeError(f"a {type(t).__name__} may be more than shape and values")
    bare = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return nn.Parameter(bare, t.requires_grad) if type(t) is nn.Parameter else bare


class _Unseen(TorchDispatchMode):
    """Tells of operations that no function of torch which Python calls has asked for: scripted code's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0  # of such functions that run now
        self.found = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.calls:
            self.found = str(function)
        return function(*args, **(kwargs or {}))


class _Listing(TorchFunctionMode):
    """Lists the functions that are called in a forward, and which tensors they hand to one another."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.unseen = _Unseen()
        self._thread = threading.get_ident()
        self._nodes: list[Node] = []
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._stack: list[tuple[str, int]] = []
        self._count = 0
        self._owned = {id(t): n for n, t in enumerate((*model.parameters(), *model.buffers()))}
        self._lines: list[str] | None = [_described(t) for t in (*model.parameters(), *model.buffers())]
        # The last to make a tensor, and to write its memory; all tensors stay, so that no id is used twice.
        self._made: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._kept: list[Any] = []
        self._given = {id(t) for t in inputs}
        for t in inputs:
            self._add(Node("input", ()), (t,))
            self._lines.append(_described(t))

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = _tensors((args, kwargs))
        before = [t._version for t in read]
        self.unseen.calls += 1
        try:
            result = function(*args, **kwargs)
            made = _tensors(result)
            written = [t for t, version in zip(read, before, strict=True) if t._version != version]
            if made or written:
                name = getattr(function, "__name__", str(function)).strip("_")
                inputs = [node for node in map(self._origin, read) if node is not None]
                self._describe(f"{getattr(function, '__module__', '')}.{name}", args, kwargs, before)
                self._add(Node(name, inputs, tuple(self._stack)), made, written)
        finally:  # a digest is made by functions of torch too
            self.unseen.calls -= 1
        return result

    def _add(self, node: Node, made: Iterable[Tensor], written: Iterable[Tensor] = ()) -> None:
        for t in made:
            self._made[id(t)] = len(self._nodes)
        for t in written:
            self._written[t.untyped_storage()._cdata] = len(self._nodes)
        self._kept += [*made, *written]
        self._nodes.append(node)

    def _describe(self, name: str, args: Any, kwargs: Any, versions: list[int]) -> None:
        """Add a line about a call: what it was given, tensors by where they are from."""
        if self._lines is not None:
            leaves, structure = _pytree.tree_flatten((args, kwargs))
            given = [self._place(each) if isinstance(each, Tensor) else repr(each) for each in leaves]
            self._lines.append(f"{self._stack[-1:]} {name} {structure} {given} {versions}")

    def _place(self, t: Tensor) -> str:
        last = self._last(t)
        return f"{last} {_described(t)}" if last >= 0 else f"weight {self._owned.get(id(t))}"

    def _last(self, t: Tensor) -> int:
        return max(self._made.get(id(t), -1), self._written.get(t.untyped_storage()._cdata, -1))

    def _origin(self, t: Tensor) -> Node | None:
        """The node that computed `t`; None of a weight."""
        last = self._last(t)
        if last < 0 and id(t) not in self._owned:
            self._add(Node("a constant", ()), (t,))
            last = len(self._nodes) - 1
            if t.is_meta:
                self._lines = None  # made by what is not listed, as a scripted module
            elif self._lines is not None:
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

    def ended(self, outputs: Any) -> tuple[list[Node], str | None]:
        """All that was listed, and its digest; somebody reads the outputs, and what else the model keeps.

        Raises:
            RuntimeError: not all could be listed.
        """
        if self.unseen.found:
            raise RuntimeError(f"{self.unseen.found} cannot be listed")
        read = [self._origin(t) for t in _tensors(outputs)]
        self._describe("output", (outputs,), {}, [])
        # In an attribute of the model, in an object that no pytree knows.
        stays = self._owned.keys() | self._given
        kept = [(weakref.ref(t), self._origin(t)) for t in self._kept if id(t) not in stays]
        self._kept.clear()
        if any(node not in read for t, node in kept if t() is not None):
            gc.collect()
        read += [node for t, node in kept if t() is not None]
        self._nodes.append(Node("output", filter(None, read)))
        lines = None if self._lines is None else "\n".join(self._lines)
        return self._nodes, None if lines is None else hashlib.sha256(lines.encode()).hexdigest()


def _described(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} {list(t.stride())}"


def digest_of_values(t: Tensor) -> str:
    """A digest of the values of a tensor on a CPU."""
    values = t.detach().resolve_conj().resolve_neg().reshape(-1)
    values = values if values.stride() == (1,) else values.clone(memory_format=torch.contiguous_format)
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _exported(model: nn.Module, inputs: Any, training: bool) -> list[Node]:
    """The operations of a forward, by a non-strict `torch.export`, which can do without more values."""
    with undisturbed(model), running_mode(model, training), backend("aten"), torch.no_grad():
        args, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        program = torch.export.export(model, cloned(args), cloned(named), strict=False)
    signature = program.graph_signature
    weights = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    made: dict[str, Node] = {}
    for node in program.graph.nodes:
        # A second call of a module has a key of its own.
        stack = tuple((path, key) for key, (path, *_) in node.meta.get("nn_module_stack", {}).items())
        read = [made[each.name] for each in node.all_input_nodes if each.name not in weights]
        made[node.name] = Node(str(node.target), read, stack)
    return [node for name, node in made.items() if name not in weights]
