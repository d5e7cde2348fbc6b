"""`torch.compile(model, backend="segfast")`: inductor, but for groups of layers that something runs faster.

Without gradients a graph is compiled with the values of its parameters in it, as inductor's freezing does,
and anew once one of them changes: that freezing would not notice.
"""

import copy
import gc
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ops._prepared_weights import watch
from .graph_parts import FROZEN, put_constant
from .rewrite import rewrite

_RESTS = ("inductor", "eager")
# So often a graph is compiled anew because its parameters changed; from then on they are its arguments.
_MOST_COMPILATIONS = 8
_PLAIN = (Tensor, torch.nn.Parameter)

Compile = Callable[[fx.GraphModule, Sequence[Any], bool], Callable[..., Any]]


def segfast_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile` finds under the name "segfast".

    Args:
        module: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: inductor's, such as "reduce-overhead".
        options: {"rest": "eager"} leaves what is not segfast's to eager mode; every other option is
            inductor's.

    Raises:
        ValueError: `rest` is neither "inductor" nor "eager", or there are options of inductor beside
            "eager".
    """
    settings = dict(options or {})
    rest = settings.pop("rest", "inductor")
    if rest not in _RESTS:
        raise ValueError(f'options["rest"] must be one of {", ".join(map(repr, _RESTS))}, got {rest!r}')
    if rest == "eager" and (settings or mode is not None):
        unused = sorted(settings) + ([f"mode {mode!r}"] if mode is not None else [])
        raise ValueError(
            f'options["rest"] "eager" leaves nothing to inductor, got {", ".join(unused)} for it'
        )
    compile_rest = _eagerly if rest == "eager" else _by_inductor(mode, settings)
    if not torch.is_grad_enabled():
        frozen = _Frozen(module, _static(module), compile_rest)
        if frozen.freeze(example_inputs, example_inputs):
            return frozen.__call__
    rewrite(module)
    return compile_rest(module, example_inputs, False)


def _eagerly(module: fx.GraphModule, inputs: Sequence[Any], frozen: bool) -> Callable[..., Any]:
    return module.forward


def _by_inductor(mode: str | None, settings: Mapping[str, Any]) -> Compile:
    from torch._inductor import list_mode_options  # heavy
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode is not None else {}), **settings}

    def compile_rest(module: fx.GraphModule, inputs: Sequence[Any], frozen: bool) -> Callable[..., Any]:
        on_cpu = any([isinstance(x, Tensor) and x.is_cpu for x in inputs])
        freezing = {"freezing": True} if frozen and on_cpu else {}
        compiled: Any = compile_fx(module, list(inputs), config_patches={**freezing, **patches})
        return compiled

    return compile_rest


class _Frozen:
    """A graph compiled with the values of its parameters in it, anew when these have changed."""

    def __init__(self, module: fx.GraphModule, static: Sequence[int], compile_rest: Compile) -> None:
        self._module, self._static, self._compile_rest = module, static, compile_rest
        self._placeholders = module.graph.find_nodes(op="placeholder")
        self._others = [i for i in range(len(self._placeholders)) if i not in frozenset(static)]
        self._compilations = 0
        self._ran = False
        # Takes the parameters as arguments; None as long as their values are compiled in.
        self._general: Callable[..., Any] | None = None

    def freeze(self, args: Sequence[Any], examples: Sequence[Any]) -> bool:
        """Compile with the parameters' values in `args`; False where these are none to be kept.

        `examples` are the graph's arguments as the compiler is to see them.
        """
        values = [args[i] for i in self._static]
        plain = all([type(value) in _PLAIN and not value.is_inference() for value in values])
        if not values or not plain or self._compilations == _MOST_COMPILATIONS:
            return False
        watch(*values)
        watched = [*values, *_counters(values)]
        states = _states(watched)
        module = fx.GraphModule(self._module, copy.deepcopy(self._module.graph))
        module.meta.update(self._module.meta)
        arguments = module.graph.find_nodes(op="placeholder")
        for index, value in zip(self._static, values, strict=True):
            _freeze(module, arguments[index], value)
        rewrite(module)
        self._run = self._compile_rest(module, [examples[i] for i in self._others], True)
        self._kept, self._watched, self._states = values, watched, states
        self._compilations += 1
        self._ran = False
        return True

    def __call__(self, *args: Any) -> Any:
        if self._general is None and self._changed(args) and not self.freeze(args, self._examples()):
            self._give_up()
        if self._general is not None:
            return self._general(*args)
        result = self._run(*[args[i] for i in self._others])
        if not self._ran:
            self._ran = True
            if self._changed(args):
                self._give_up()  # the graph itself writes to them
        return result

    def _changed(self, args: Sequence[Any]) -> bool:
        values = [args[i] for i in self._static]
        same = all(map(operator.is_, values, self._kept))
        return not same or self._states != _states(self._watched)

    def _examples(self) -> list[Any]:
        return [node.meta["example_value"] for node in self._placeholders]

    def _give_up(self) -> None:
        self._kept, self._watched = [], []
        rewrite(self._module)
        self._general = self._compile_rest(self._module, self._examples(), False)


def _states(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to, and where it lies."""
    return [tensor._version for tensor in tensors] + [tensor.data_ptr() for tensor in tensors]


def _freeze(module: fx.GraphModule, argument: fx.Node, value: Tensor) -> None:
    """Put a tensor of `module` in the place of an argument."""
    constant = put_constant(module, f"constant_{argument.name}", value, argument)
    constant.meta = {**argument.meta, FROZEN: True}
    argument.replace_all_uses_with(constant)
    module.graph.erase_node(argument)


def _static(module: fx.GraphModule) -> list[int]:
    """The places of the arguments that are parameters and buffers; none where gradients are switched on."""
    graph = module.graph
    if any([node.target is torch._C._set_grad_enabled for node in graph.nodes]):
        return []
    nodes = graph.find_nodes(op="placeholder")
    return [i for i, n in enumerate(nodes) if "_dynamo_static_input_type" in n.meta.get("tensor_dict", {})]


def _counters(buffers: Sequence[Tensor]) -> list[Tensor]:
    """The counters of batches of the norms whose statistics are among `buffers`.

    A training step writes statistics without marking them as written; it does mark the counter, which a graph
    in eval has no use for, so that nothing but the norm's own dictionary leads to it.
    """
    owners = [d for d in gc.get_referrers(*buffers) if type(d) is dict and "running_mean" in d]
    found = [d.get("num_batches_tracked") for d in owners]
    return [counter for counter in found if isinstance(counter, Tensor)]
