"""Passes of a model by a clock, with a watch and without: forward, and in training backward."""

import contextlib
import dataclasses
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .._optimize.verify import Inputs, cloned
from ..nn._rules import own_class
from .facts import Facts, facts_of, tensors_in
from .spans import ROOT, Key, Nodes, Span, Watch, names_of

CHANGING = "the model made other calls in one pass than in another, so that its layers cannot be timed"


class Stopwatch:
    """Time stamps of a device, and the microseconds between two: on a GPU of CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def now(self) -> Any:
        """A time stamp."""
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def us(self, begin: Any, end: Any) -> float:
        """Microseconds from one stamp to another."""
        return 1e6 * (end - begin) if self._device is None else 1e3 * begin.elapsed_time(end)

    def wait(self) -> None:
        """Let the device come to rest."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to run, on what, and whether backward too."""

    model: nn.Module
    inputs: Inputs
    train: bool
    device: torch.device

    def forward(self, inputs: Inputs) -> Any:
        """The model's outputs."""
        return self.model(**inputs) if isinstance(inputs, dict) else self.model(*inputs)

    def scores(self, outputs: Any) -> list[Tensor]:
        """The outputs that a backward pass begins with; none where there is no such pass."""
        if not self.train:
            return []
        scores = [t for t in tensors_in(outputs) if t.requires_grad]
        if not scores:
            raise ValueError("train: no output of the model requires a gradient")
        return scores

    def batch(self) -> int:
        """Images in a call: the first dimension of the first input that has one."""
        return next((t.shape[0] for t in tensors_in(self.inputs) if t.dim()), 1)

    def prepared(self) -> Inputs:
        """Copies of the inputs, as a forward may work in place; gradients of an earlier pass are gone."""
        self.model.zero_grad(set_to_none=True)
        return cloned(self.inputs)


@dataclasses.dataclass
class Pass:
    """The spans of a pass, the runs of autograd's nodes, and the readings of forward and backward.

    A run is [number of the span that the node was made in or -1, begin, end, the node's name].
    """

    spans: list[Span]
    runs: list[list[Any]]
    forward: tuple[Any, Any]
    backward: tuple[Any, Any] | None


def plain_pass(
    task: Task,
    now: Callable[[], Any],
    annotate: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Pass:
    """One pass that nobody watches; `annotate("forward")` and `annotate("backward")` are around its parts."""
    inputs = task.prepared()
    with annotate("forward"), torch.set_grad_enabled(task.train):
        begin = now()
        outputs = task.forward(inputs)
        end = now()
    with annotate("backward"):
        backward = _backward(task, outputs, now)
    return Pass([], [], (begin, end), backward)


def watched_pass(task: Task, watch: Watch, begin: Callable[[], Any], end: Callable[[], Any]) -> Pass:
    """One pass under `watch`; nodes of the backward are read by `begin` and `end`."""
    inputs = task.prepared()
    with torch.set_grad_enabled(task.train), watch.watching():
        whole = watch.begin(ROOT)
        outputs = task.forward(inputs)
        watch.end()
    forward = (whole.begin, whole.end)
    if not task.train:
        return Pass(watch.spans, [], forward, None)
    nodes = Nodes(task.scores(outputs), watch.spans, _owners(task.model, watch.spans), begin, end)
    try:
        backward = _backward(task, outputs, begin, end)
    finally:
        nodes.remove()
    return Pass(watch.spans, nodes.runs, forward, backward)


def _backward(task: Task, outputs: Any, begin: Any, end: Any = None) -> tuple[Any, Any] | None:
    scores = task.scores(outputs)
    if not scores:
        return None
    gradients = [torch.randn_like(t) for t in scores]
    start = begin()
    torch.autograd.backward(scores, gradients)
    return start, (end or begin)()


def _owners(model: nn.Module, spans: list[Span]) -> dict[int, int]:
    """The last span of the module that a parameter belongs to, by the parameter's id."""
    by_name = {part: span.index for span in spans for part in span.key.parts}
    return {
        id(parameter): by_name[name]
        for name, module in model.named_modules()
        for parameter in module._parameters.values()
        if name in by_name and parameter is not None
    }


@dataclasses.dataclass(frozen=True)
class Plan:
    """The spans that each timed pass of a task is to find: keys and parents, and the facts of its leaves."""

    names: dict[int, str]
    leaves: frozenset[int]
    keys: list[Key]
    parents: list[int]
    facts: dict[int, Facts]
    # Keys by what was called, for the watch.
    known: dict[Any, Key | None] = dataclasses.field(default_factory=dict)

    def watch(self, begin: Any, end: Any = None, annotate: Any = None) -> Watch:
        """A watch for a pass."""
        return Watch(self.names, begin, end, self.leaves, annotate, keys=self.known)

    def check(self, found: Pass) -> None:
        """Raise a ValueError if a pass made other calls."""
        if [span.key for span in found.spans] != self.keys:
            raise ValueError(CHANGING)

    def enclosing(self, *indices: int) -> str:
        """The name of the innermost module that all of these spans are in."""
        chains = [list(self._chain(index)) for index in indices]
        shared = max((each for each in chains[0] if all(each in chain for chain in chains)), default=0)
        return self.keys[shared].name

    def _chain(self, index: int) -> Iterator[int]:
        while (index := self.parents[index]) >= 0:
            yield index


def plan_of(task: Task) -> Plan:
    """Run the task twice, to learn what its forward calls and which modules have nothing inside."""
    names, clock = names_of(task.model), lambda: 0
    modules = dict(task.model.named_modules())
    alone = {id(m) for m in modules.values() if not m._modules and (m is not task.model or _is_layer(m))}
    first = Watch(names, clock, leaves=frozenset(alone))
    watched_pass(task, first, clock, clock)
    called = {span.key.name for span in first.spans if len(span.key.parts) == 1}
    with_layers = {first.spans[span.parent].key.name for span in first.spans[1:] if span.key.parts}
    leaves = {id(modules[n]) for n in called - with_layers if n or _is_layer(task.model)} | alone
    facts: dict[int, Facts] = {}

    def observe(span: Span, inputs: Any, output: Any) -> None:
        parts = [modules[name] for name in span.key.parts]
        facts[span.index] = facts_of(inputs, output, [*parts[0].modules()] if len(parts) == 1 else parts)

    second = Watch(names, clock, leaves=frozenset(leaves), observe=observe)
    watched_pass(task, second, clock, clock)
    parents = [span.parent for span in second.spans]
    return Plan(
        names,
        frozenset(leaves),
        [span.key for span in second.spans],
        parents,
        {index: facts[index] for index in sorted(facts) if index not in parents},
    )


def _is_layer(module: nn.Module) -> bool:
    """True of a layer of torch's or ours: a model that is one has nothing inside."""
    return own_class(module).__module__.startswith(("torch.nn.modules.", "segfast.nn."))


def _convolution_backward_flops(
    gradient: Sequence[int],
    input: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
    out_shape: Any = None,
) -> int:
    """As many as the forward's for each of the gradients of input and filters that is wanted; of shapes."""
    pixels = input if transposed else gradient
    return 2 * math.prod(weight) * pixels[0] * math.prod(pixels[2:]) * sum(wanted[:2])


# What torch's counter is told to count in another way: not the gradient of a grouped convolution's filters
# as that of a dense one's.
OWN_FLOPS = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


class Flops(NamedTuple):
    """Floating-point operations of each leaf by its number, forward and backward, and of all."""

    forward: dict[int, int]
    backward: dict[int, int]
    total: int


def flops_of(task: Task, plan: Plan) -> Flops:
    """The FLOPs of a pass as torch's flop counter counts them: of convolutions and matrix products.

    Nothing runs fused where a counter looks: a fused layer's are those of the layers that it computes.
    """
    counter = FlopCounterMode(display=False, custom_mapping=OWN_FLOPS)
    count = counter.get_total_flops
    with counter:
        found = watched_pass(task, Watch(plan.names, count), count, count)
    backward: dict[int, int] = defaultdict(int)
    for index, begin, end, _ in found.runs:
        while index >= 0:
            backward[index] += end - begin
            index = found.spans[index].parent
    # Of each layer its calls in order, and of each function in a module.
    counted: dict[Any, deque[tuple[int, int]]] = defaultdict(deque)
    for span in found.spans:
        what = span.key.name if span.key.parts else (span.key.name, span.key.kind)
        counted[what].append((span.end - span.begin, backward[span.index]))
    result = Flops({}, {}, count())
    for index in plan.facts:
        key = plan.keys[index]
        names = [n for n in key.parts if not any(n.startswith(f"{other}.") for other in key.parts)]
        called: list[Any] = [*names] or [(key.name, key.kind)]
        calls = [counted[each] for each in called]
        pairs = [call.popleft() for call in calls if call]
        result.forward[index], result.backward[index] = (sum(pair[i] for pair in pairs) for i in (0, 1))
    return result
