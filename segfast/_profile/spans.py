"""Watching a model run: when each layer, fused layer and function call began and ended, by any clock.

Hooks on a layer, or global ones, would keep it from being fused. So the call itself is replaced while this
watches, of `nn.Module` and of what computes layers as one; functions that a forward calls are seen by a mode.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..nn._fused import whole_model
from ..nn._fused.aspp import FusedASPP
from ..nn._fused.conv import FusedConv
from ..nn._fused.separable import FusedSeparable
from ..nn._fused.sequence import FusedSequence
from ..ops.conv_transpose2d import functional as transposed
from .facts import is_copying, kind_of_function, kind_of_fused, kind_of_module, parts_of_fused

Clock = Callable[[], Any]


class Key(NamedTuple):
    """Whose a span is: a module's qualified name, the kind, and the modules that are computed in it.

    A function call has no modules. Nothing inside a leaf is watched.
    """

    name: str
    kind: str
    parts: tuple[str, ...] = ()
    is_leaf: bool = False


# The whole forward: what its caller sees.
ROOT = Key("", "")


class Span:
    """From when to when something ran, by the watch's clock, and within which other span (-1: none).

    `first` and `last` are the sequence numbers of autograd at begin and end: the nodes made in it have those
    from `first` to before `last`.
    """

    __slots__ = ("begin", "end", "first", "index", "key", "last", "parent")

    def __init__(self, key: Key, index: int, parent: int) -> None:
        self.key, self.index, self.parent = key, index, parent
        self.begin: Any = None
        self.end: Any = None
        self.first = self.last = 0


Annotate = Callable[[Span], contextlib.AbstractContextManager]


class Watch:
    """The spans of one pass of a model.

    Args:
        names: qualified names of the model's modules, by id.
        begin, end: the clock, read at the begin and at the end of a span.
        leaves: ids of modules in which nothing else is to be watched.
        annotate: makes a context for each span, within which it runs.
        observe: told of each span that ends, with what was called, its inputs and its output.
        keys: of what was called in an earlier pass with the same leaves.
    """

    def __init__(
        self,
        names: dict[int, str],
        begin: Clock,
        end: Clock | None = None,
        leaves: frozenset[int] = frozenset(),
        annotate: Annotate | None = None,
        observe: Callable[[Span, Any, Any], None] | None = None,
        keys: dict[Any, Key | None] | None = None,
    ) -> None:
        self.spans: list[Span] = []
        self._names, self._leaves = names, leaves
        self._begin, self._end = begin, end or begin
        self._annotate, self._observe = annotate, observe
        self._keys = {} if keys is None else keys
        self._open: list[tuple[Span, Any]] = []
        self._thread = threading.get_ident()
        self._mode = _Functions(self)
        self._in_leaf = False

    def begin(self, key: Key) -> Span:
        """Begin a span within the one that is open."""
        parent = self._open[-1][0].index if self._open else -1
        span = Span(key, len(self.spans), parent)
        self.spans.append(span)
        context = None
        if self._annotate is not None:
            inside, self._in_leaf = self._in_leaf, True  # it may call torch's functions
            context = self._annotate(span)
            context.__enter__()
            self._in_leaf = inside
        self._open.append((span, context))
        span.first = torch._C._autograd._get_sequence_nr()
        span.begin = self._begin()
        return span

    def end(self) -> Span:
        """End the span that is open."""
        now = self._end()
        span, context = self._open.pop()
        span.end = now
        span.last = torch._C._autograd._get_sequence_nr()
        if context is not None:
            inside, self._in_leaf = self._in_leaf, True
            context.__exit__(None, None, None)
            self._in_leaf = inside
        return span

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all calls of this thread meanwhile."""
        with contextlib.ExitStack() as stack:
            for owner, name, key_of in (
                (nn.Module, "__call__", self._of_module),
                (FusedSequence, "compute", self._of_sequence),
                (FusedConv, "run", self._of_fused),
                (FusedSeparable, "run", self._of_fused),
                (FusedASPP, "run", self._of_aspp),
                (whole_model, "interpolate", self._of_function("resize")),
                (transposed, "by_axis", self._of_function("conv_transpose2d")),
            ):
                watched = self._watched(vars(owner)[name], key_of)
                stack.enter_context(_replaced(owner, name, watched))
            stack.enter_context(self._mode)
            yield

    def is_watched(self) -> bool:
        """True if what is called now is to have a span of its own."""
        return not self._in_leaf and bool(self._open) and threading.get_ident() == self._thread

    def _watched(self, original: Any, key_of: Callable[..., Key | None]) -> Any:
        """`original`, in a span where `key_of` its arguments knows one."""

        def called(*args: Any, **kwargs: Any) -> Any:
            key = key_of(*args) if self.is_watched() else None
            if key is None:
                return original(*args, **kwargs)
            popped = key.is_leaf and _get_current_function_mode() is self._mode
            if popped:  # else each look at a tensor's shape would come by
                self._mode.__exit__(None, None, None)
            span = self.begin(key)
            self._in_leaf = key.is_leaf
            try:
                output = original(*args, **kwargs)
            finally:
                self.end()
                self._in_leaf = False
                if popped:
                    self._mode.__enter__()
            if output is None and not isinstance(args[0], nn.Module):
                self.spans.pop()  # others shall compute it
            elif self._observe is not None:
                self._observe(span, (args, kwargs), output)
            return output

        return called

    def _of_module(self, module: nn.Module, *args: Any) -> Key | None:
        key = self._keys.get(id(module))
        if key is None and id(module) in self._names:
            name = self._names[id(module)]
            key = Key(name, kind_of_module(module), (name,), id(module) in self._leaves)
            self._keys[id(module)] = key
        return key

    def _of_sequence(self, sequence: FusedSequence, *args: Any) -> Key | None:
        known = id(sequence)
        if known not in self._keys:
            self._keys[known] = self._of_parts(sequence.layers, kind_of_fused(sequence.options[0][1]))
        return self._keys[known]

    def _of_fused(self, fused: Any, *args: Any) -> Key | None:
        known = tuple([id(part) if isinstance(part, nn.Module) else part for part in fused])
        if known not in self._keys:
            self._keys[known] = self._of_parts(parts_of_fused(fused), kind_of_fused(fused))
        return self._keys[known]

    def _of_aspp(self, fused: FusedASPP, owner: nn.Module, *args: Any) -> Key | None:
        return self._of_parts(list(owner.modules()), "aspp")

    def _of_function(self, kind: str) -> Callable[..., Key]:
        return lambda *_: Key(self.innermost(), kind, is_leaf=True)

    def _of_parts(self, parts: Sequence[nn.Module], kind: str) -> Key | None:
        """The key of layers that are computed as one; None of layers of another model."""
        names = tuple([self._names[id(part)] for part in parts if id(part) in self._names])
        return Key(names[0], kind, names, True) if names else None

    def innermost(self) -> str:
        """The name of the module whose call is open."""
        return self._open[-1][0].key.name


# Functions that compute nothing; others that return no tensor are found out by calling them.
_QUESTIONS = frozenset(
    [
        *("__get__", "data_ptr", "dim", "element_size", "is_contiguous", "is_floating_point", "is_inference"),
        *("ndimension", "nelement", "numel", "size", "storage_offset", "stride"),
    ]
)


class _Functions(TorchFunctionMode):
    """Gives a span to each torch function that a watched forward calls and that computes a tensor."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch, kwargs = self._watch, kwargs or {}
        if getattr(func, "__name__", "") in _QUESTIONS or not watch.is_watched():
            return func(*args, **kwargs)
        span = watch.begin(Key(watch.innermost(), kind_of_function(func), is_leaf=True))
        try:
            output = func(*args, **kwargs)
        finally:
            watch.end()
        given = args[0] if args else None
        first = output[0] if isinstance(output, tuple | list) and output else output
        is_nothing = not isinstance(first, Tensor) or (first is given and is_copying(func))
        if is_nothing or (first is not given and first._is_view()):
            watch.spans.pop()
        elif watch._observe is not None:
            watch._observe(span, (args, kwargs), output)
        return output


@contextlib.contextmanager
def _replaced(owner: Any, name: str, other: Any) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, original)


def names_of(model: nn.Module) -> dict[int, str]:
    """The qualified name of each module in `model`, by id."""
    return {id(module): name for name, module in model.named_modules()}


class Nodes:
    """Watches a backward pass: when each of autograd's nodes began and ended, and in which span it was made.

    Args:
        scores: the tensors that the backward begins with.
        spans: of the forward pass.
        owners: of each parameter, by id, the number of the span that adding up its gradient belongs to.
        begin, end: the clock.
    """

    def __init__(
        self, scores: list[Tensor], spans: list[Span], owners: dict[int, int], begin: Clock, end: Clock
    ) -> None:
        # Each [number of the innermost span that the node was made in or -1, begin, end, the node's name].
        self.runs: list[list[Any]] = []
        self._begin, self._end = begin, end
        self._handles: list[Any] = []
        seen: set[Any] = set()
        stack: list[Any] = [t.grad_fn for t in scores]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            self._hook(node, _made_in(node, spans, owners))

    def _hook(self, node: Any, span: int) -> None:
        name = node.name()

        def before(gradients: Any) -> None:
            self.runs.append([span, self._begin(), None, name])

        def after(*_: Any) -> None:
            self.runs[-1][2] = self._end()

        self._handles += [node.register_prehook(before), node.register_hook(after)]

    def remove(self) -> None:
        """Take the hooks off the nodes."""
        for handle in self._handles:
            handle.remove()


def _made_in(node: Any, spans: list[Span], owners: dict[int, int]) -> int:
    """The innermost span that a node of autograd was made in, or -1."""
    variable = getattr(node, "variable", None)
    if isinstance(variable, Tensor):  # what adds up a parameter's gradient
        return owners.get(id(variable), -1)
    number = node._sequence_nr()
    return max([span.index for span in spans if span.first <= number < span.last], default=-1)
