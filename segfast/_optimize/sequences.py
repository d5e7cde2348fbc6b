"""Sequences: the layers that follow a convolution in a model's forward, to be computed by one operator.

Two kinds of evidence: an `nn.Sequential`, whose forward is known; and a graph of the model's own forward, run
on example inputs.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..nn._fused.eager import only_forward
from ..nn._fused.layers import options
from ..nn._fused.sequence import FusedSequence, fuse
from ..nn._rules import own_class
from .graph import Graph
from .verify import arguments, first_line, run_once


class Found(NamedTuple):
    """A sequence by the names of its layers and of the module whose forward calls them."""

    caller: str
    names: tuple[str, ...]
    in_train: bool
    norms_in_train: bool


class Findings(NamedTuple):
    """The sequences to fuse, for each other convolution why it begins none, and the digest of the `Graph`."""

    sequences: tuple[Found, ...]
    reasons: dict[str, str]
    digest: str | None = None


def find_sequences(model: nn.Module, example_inputs: Any, heads: Iterable[str]) -> Findings:
    """The sequences that begin with the layers named `heads`. Changes nothing.

    Raises:
        TypeError: `example_inputs` is no tensor, tuple, dict or None.
        Exception: the model's own, if it does not run on them.
    """
    if example_inputs is not None and not isinstance(example_inputs, Tensor | tuple | Mapping):
        kind = type(example_inputs).__name__
        raise TypeError(f"example_inputs must be a tensor or a tuple or dict of arguments, got {kind}")
    modules = dict(model.named_modules())
    # segfast's own blocks fuse what is in them.
    blocks = tuple(
        f"{n}." if n else "" for n, m in modules.items() if type(m).__module__.startswith("segfast.nn.")
    )
    heads = [name for name in heads if not name.startswith(blocks)]
    if not heads and example_inputs is None:
        return Findings((), {})
    names = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    shared = {name for name, module in modules.items() if names[module] > 1}
    found = {head: _in_sequential(modules, head, shared) for head in heads}
    why = "nothing that can be fused follows it in an nn.Sequential; give example_inputs"
    reasons = dict.fromkeys(heads, why)
    digest = None
    if example_inputs is not None:
        inputs = arguments(example_inputs)
        try:
            graph = Graph(model, inputs, training=False)
        except Exception as error:
            run_once(model, inputs)
            reasons = dict.fromkeys(heads, f"its forward cannot be listed ({first_line(error)})")
        else:
            found, reasons = _in_model(model, inputs, modules, found, shared, graph)
            digest = graph.digest
    # A pointwise convolution may begin a sequence, or be part of a longer one.
    inside = {name for sequence in found.values() if sequence is not None for name in sequence.names[1:]}
    sequences = tuple(
        sequence for head, sequence in found.items() if sequence is not None and head not in inside
    )
    why_not = {head: reasons[head] for head in heads if found[head] is None and head not in inside}
    return Findings(sequences, why_not, digest)


def _in_model(
    model: nn.Module,
    inputs: tuple[Any, ...] | dict[str, Any],
    modules: dict[str, nn.Module],
    sequential: dict[str, Found | None],
    shared: set[str],
    graph: Graph,
) -> tuple[dict[str, Found | None], dict[str, str]]:
    """The sequences of the graph where they are longer than those in a Sequential that is called."""
    trained = functools.cache(lambda: _graph_or_none(model, inputs))
    found: dict[str, Found | None] = {}
    reasons = {}
    for head, known in sequential.items():
        if known is not None and known.caller not in graph.nodes:
            known = None
        names, reasons[head] = _in_graph(modules, head, shared, graph)
        if names is not None and (known is None or len(names) > len(known.names)):
            *_, (length, fused) = options([modules[name] for name in names])
            in_train = fused.plain() and _follow(trained(), names[:length])
            known = Found("", names, in_train, _follow(trained(), names))
        found[head] = known
    return found, reasons


def fuse_sequences(model: nn.Module, sequences: Sequence[Found], train: bool) -> None:
    """Fuse what was found; with `train` the sequences keep less in training."""
    modules = dict(model.named_modules())
    for caller in {sequence.caller for sequence in sequences}:
        own = [found for found in sequences if found.caller == caller]
        fuse(modules[caller], [_sequence(modules, found, train) for found in own])


def _sequence(modules: dict[str, nn.Module], found: Found, train: bool) -> FusedSequence:
    layers = [modules[name] for name in found.names]
    inside = [tuple(name.split(".")[:end]) for name in found.names for end in range(1, name.count(".") + 1)]
    wrappers = [modules[".".join(path)] for path, n in Counter(inside).items() if n < len(layers)]
    keeps_less = train and found.norms_in_train
    return FusedSequence(layers, found.names, options(layers), wrappers, found.in_train, keeps_less)


def _usable(name: str, module: nn.Module, shared: set[str]) -> bool:
    return name not in shared and only_forward(module)


def _longest(modules: dict[str, nn.Module], names: Sequence[str]) -> tuple[str, ...] | None:
    possible = options([modules[name] for name in names])
    return tuple(names[: possible[0][0]]) if possible else None


def _in_sequential(modules: dict[str, nn.Module], head: str, shared: set[str]) -> Found | None:
    """The sequence from `head` on in the Sequentials around it, called by the innermost that holds it all."""
    if not _usable(head, modules[head], shared):
        return None
    caller, best = head, None
    while caller:
        caller = caller.rpartition(".")[0]
        if not _is_sequential(modules[caller]) or caller in shared:
            break
        names = list(_flat(modules, caller, shared))
        if head in names:
            sequence = _longest(modules, names[names.index(head) :])
            if sequence is not None and (best is None or len(sequence) > len(best.names)):
                best = Found(caller, sequence, True, True)
        if not only_forward(modules[caller]):
            break
    return best


def _is_sequential(module: nn.Module) -> bool:
    return getattr(own_class(module), "forward", None) is nn.Sequential.forward


def _flat(modules: dict[str, nn.Module], name: str, shared: set[str]) -> Iterator[str]:
    """The names of what a Sequential calls one after the other; "" for a layer that cannot be fused."""
    for child in modules[name]._modules:
        path = f"{name}.{child}" if name else child
        module = modules.get(path)
        if module is None or not _usable(path, module, shared):
            yield ""
        elif _is_sequential(module):
            yield from _flat(modules, path, shared)
        elif type(module) is not nn.Identity:
            yield path


def _in_graph(
    modules: dict[str, nn.Module], head: str, shared: set[str], graph: Graph
) -> tuple[tuple[str, ...] | None, str]:
    """The sequence from `head` on in the graph, or None; and why it ends where it does."""
    names = [head]
    why = ""
    while not why:
        output = graph.output(names[-1])
        if names[-1] in shared or output is None:
            why = "it is not called exactly once"
        elif not only_forward(modules[names[-1]]):
            why = "there are hooks on it"
        else:
            following, why = graph.reader(output)
            if not why and following not in modules:
                why = "it is followed by a module that is not in the model"
            if not why and not _follows(modules, names, following):
                why = f"{following} ({type(modules[following]).__name__}) cannot be fused with it"
            if not why and not _usable(following, modules[following], shared):
                why = f"{following} is shared, or there are hooks on it"
            if not why and graph.output(following) is None:
                why = f"{following} is not called exactly once"
            if not why:
                names.append(following)
    return _longest(modules, names), why


def _follows(modules: dict[str, nn.Module], names: list[str], following: str) -> bool:
    possible = options([modules[name] for name in (*names, following)])
    return bool(possible) and possible[0][0] == len(names) + 1


def _graph_or_none(model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> Graph | None:
    try:
        return Graph(model, inputs, training=True)
    except Exception:
        return None


def _follow(graph: Graph | None, names: tuple[str, ...]) -> bool:
    """True if each of `names` reads the one before and nothing else, in the graph of a training step."""
    if graph is None:
        return False
    outputs = [graph.output(name) for name in names]
    return all(
        output is not None and graph.reader(output) == (following, "")
        for output, following in zip(outputs, names[1:], strict=False)
    )
