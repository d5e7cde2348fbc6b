"""Watching a model run: when each layer, fused layer and function call began and ended, by any clock.

Hooks on a layer, or global ones, would keep it from being fused. So the call itself is replaced while this
watches, of `nn.Module` and of what computes layers as one; functions that a forward calls are seen by a mode.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..nn._fused import whole_model
from ..nn._fused.aspp import FusedASPP
from ..nn._fused.conv import FusedConv
from ..nn._fused.separable import FusedSeparable
from ..nn._fused.sequence import FusedSequence
from .facts import is_copying, kind_of_function, kind_of_fused, kind_of_module, parts_of_fused

Clock = Callable[[], Any]
Annotate = Callable[[str], contextlib.AbstractContextManager]


class Key(NamedTuple):
    """What a span is of: the module's qualified name, the kind, and the modules that are computed in it."""

    name: str
    kind: str
    parts: tuple[str, ...] = ()
    # A function call or a fused layer has nothing inside.
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


class Watch:
    """The spans of one pass of a model.

    Args:
        names: qualified names of the model's modules, by id.
        begin, end: the clock, read at the begin and at the end of a span.
        leaves: ids of modules in which nothing else is to be watched.
        annotate: makes a context for each span out of its number in `spans`.
        observe: told of each span that ends, with what was called: its owner, inputs and output.
    """

    def __init__(
        self,
        names: dict[int, str],
        begin: Clock,
        end: Clock | None = None,
        leaves: frozenset[int] = frozenset(),
        annotate: Annotate | None = None,
        observe: Callable[[Span, Any, Any, Any], None] | None = None,
    ) -> None:
        self.names, self.leaves = names, leaves
        self.spans: list[Span] = []
        self._begin, self._end = begin, end or begin
        self._annotate, self._observe = annotate, observe
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
            context = self._annotate(str(span.index))
            context.__enter__()
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
            context.__exit__(None, None, None)
        return span

    def cancel(self) -> None:
        """End the span that is open, and drop it: nothing was computed in it."""
        self.end()
        self.spans.pop()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all calls of this thread meanwhile."""
        with contextlib.ExitStack() as stack:
            for owner, name, wrapper in (
                (nn.Module, "__call__", self._module),
                (FusedSequence, "compute", self._sequence),
                (FusedConv, "run", self._fused),
                (FusedSeparable, "run", self._fused),
                (FusedASPP, "run", self._aspp),
                (whole_model, "interpolate", self._resize),
            ):
                stack.enter_context(_replaced(owner, name, wrapper))
            stack.enter_context(self._mode)
            yield

    def is_watched(self) -> bool:
        """True if what is called now is to have a span of its own."""
        return not self._in_leaf and bool(self._open) and threading.get_ident() == self._thread

    def _call(self, key: Key, leaf: bool, owner: Any, call: Callable[[], Any], inputs: Any) -> Any:
        """The result of `call`, in a span; of a leaf nothing inside is watched."""
        span = self.begin(key)
        popped = leaf and _get_current_function_mode() is self._mode
        self._in_leaf = leaf
        if popped:  # else each look at a tensor's shape would come by
            self._mode.__exit__(None, None, None)
        try:
            output = call()
        except BaseException:
            self._open.pop()
            raise
        finally:
            if popped:
                self._mode.__enter__()
            self._in_leaf = False
        if output is None and isinstance(owner, FusedSequence):
            self.cancel()  # its layers shall compute it themselves
            return None
        self.end()
        if self._observe is not None:
            self._observe(span, owner, inputs, output)
        return output

    def _module(self, original: Any) -> Any:
        keys: dict[int, Key] = {}

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self.names.get(id(module))
            if name is None or not self.is_watched():
                return original(module, *args, **kwargs)
            key = keys.get(id(module))
            if key is None:
                key = keys[id(module)] = Key(name, kind_of_module(module), (name,))
            leaf = id(module) in self.leaves
            return self._call(key, leaf, module, lambda: original(module, *args, **kwargs), (args, kwargs))

        return __call__

    def _sequence(self, original: Any) -> Any:
        def compute(sequence: FusedSequence, input: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_watched() or id(sequence.layers[0]) not in self.names:
                return original(sequence, input, *args, **kwargs)
            key = self._key(sequence.layers, kind_of_fused(sequence.options[0][1]))
            return self._call(key, True, sequence, lambda: original(sequence, input, *args, **kwargs), input)

        return compute

    def _fused(self, original: Any) -> Any:
        def run(fused: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            parts = parts_of_fused(fused)
            if not self.is_watched() or id(parts[0]) not in self.names:
                return original(fused, input, *args, **kwargs)
            key = self._key(parts, kind_of_fused(fused))
            inputs = (input, args, kwargs)
            return self._call(key, True, fused, lambda: original(fused, input, *args, **kwargs), inputs)

        return run

    def _aspp(self, original: Any) -> Any:
        def run(fused: FusedASPP, owner: nn.Module, input: Any) -> Any:
            if not self.is_watched() or id(owner) not in self.names:
                return original(fused, owner, input)
            key = self._key([owner, *[m for m in owner.modules() if m is not owner]], "aspp")
            return self._call(key, True, owner, lambda: original(fused, owner, input), input)

        return run

    def _resize(self, original: Any) -> Any:
        def interpolate(*args: Any, **kwargs: Any) -> Any:
            if not self.is_watched():
                return original(*args, **kwargs)
            key = Key(self.innermost(), "resize", is_leaf=True)
            return self._call(key, True, None, lambda: original(*args, **kwargs), (args, kwargs))

        return interpolate

    def _key(self, parts: Any, kind: str) -> Key:
        names = tuple([self.names[id(part)] for part in parts if id(part) in self.names])
        return Key(names[0], kind, names, True)

    def innermost(self) -> str:
        """The name of the module whose call is open."""
        return self._open[-1][0].key.name


class _Functions(TorchFunctionMode):
    """Gives a span to each torch function that a watched forward calls and that computes a tensor."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch, kwargs = self._watch, kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or not watch.is_watched():
            return func(*args, **kwargs)
        span = watch.begin(Key(watch.innermost(), kind_of_function(func), is_leaf=True))
        try:
            output = func(*args, **kwargs)
        except BaseException:
            watch._open.pop()
            raise
        given = args[0] if args else None
        first = output[0] if isinstance(output, tuple | list) and output else output
        is_nothing = not isinstance(first, Tensor) or (first is given and is_copying(func))
        if is_nothing or (first is not given and first._is_view()):
            watch.cancel()
            return output
        watch.end()
        if watch._observe is not None:
            watch._observe(span, None, (args, kwargs), output)
        return output


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, wrapper(original))
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
