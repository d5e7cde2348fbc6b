"""`segfast check`: a model before and after `segfast.optimize`; error, time, memory, and whether it pays."""

import argparse
import collections
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import UserError, describe
from .._optimize.optimize import Gain, Report, optimize, report
from .._optimize.verify import arguments
from .._table import format_table
from .._timing import Timing, interleave
from ..nn._fused.whole_model import dtype_of
from ..ops._backend import Explanation, explain
from ._check_advice import advice
from ._difference import Difference, error_line, name_of, roundoff, worst
from ._load_model import FORMS, add_device, input_channels, load_model, parse_device, parse_dtype, parse_size
from ._memory import MEMORY_KINDS, peak_bytes
from ._step import LAYOUTS, Step, floating, has_layouts, laid_out, layout_of, on_aten, seeded

WORTH_IT = 1.05


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The findings of `check_model`: `before` on ATen, `after` optimized. `str()` is a page of text.

    `layouts` has the times before in each layout that was tried, `layout` is the fastest of them, `given` the
    one that the model has. `compute` is the dtype that `optimize` was asked to compute in, `computed` the one
    that the optimized model does compute in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    train: bool
    output: Difference
    gradient: Difference | None
    layout: str
    layouts: Mapping[str, Timing]
    after: Timing
    before_bytes: int
    after_bytes: int
    report: Report
    explanations: tuple[Explanation, ...]
    given: str = ""
    compute: torch.dtype | None = None
    computed: torch.dtype | None = None

    @property
    def before(self) -> Timing:
        """The times before, in the faster layout."""
        return self.layouts[self.layout]

    @property
    def ratio(self) -> float:
        """Wall time before over wall time after: above 1 is faster."""
        return self.before.wall_us / self.after.wall_us

    @property
    def agrees(self) -> bool:
        """True if no relative difference is above the square root of the precision's roundoff."""
        limit = math.sqrt(roundoff(self.computed or self.dtype, self.device))
        return all(d is None or d.relative <= limit for d in (self.output, self.gradient))

    @property
    def worth_it(self) -> bool:
        """Faster by 5% at least, beyond the runs' own spread, with outputs that agree."""
        apart = self.after.wall_p80 < self.before.wall_p20
        changed = self.concerns_us and not self.left_as_it_was
        return self.agrees and changed and apart and self.ratio >= WORTH_IT

    @property
    def left_as_it_was(self) -> bool:
        """True where `optimize` timed the whole model, which was not faster, and undid all."""
        return self.report.gain is not None and not self.report.gain.kept

    @property
    def in_channels_last(self) -> float | None:
        """How many times as fast channels_last is as the model's own layout, where that pays by itself."""
        if self.layout != "channels_last" or self.given not in self.layouts:
            return None
        given = self.layouts[self.given]
        ratio = given.wall_us / self.before.wall_us
        return ratio if ratio >= WORTH_IT and given.wall_p20 > self.before.wall_p80 else None

    @property
    def concerns_us(self) -> bool:
        """True if any layer was replaced, or any operation of ours ran."""
        return bool(self.report.replaced or self.explanations)

    @property
    def verdict(self) -> str:
        """One sentence."""
        gain = f"{self.ratio:.2f}x"
        if not self.agrees and self.computed is not None:
            dtype = name_of(self.computed)
            return f"DIFFERENT: {dtype}'s rounding does not explain how far the outputs are off."
        if not self.agrees:
            return "DIFFERENT: the optimized model does not compute what the original does; please report it."
        measured = self.report.gain
        if measured is not None and not measured.kept:
            return f"Not worth it: {_as_it_was(measured)}."
        if not self.concerns_us:
            return "Not worth it: nothing in the model is segfast's, before or after."
        if self.worth_it:
            return f"Worth it: {gain} faster."
        if self.ratio >= WORTH_IT:
            return f"Not worth it: {gain} is within the spread of the runs."
        return f"Not worth it: {gain}, less than {WORTH_IT} times as fast."

    def __str__(self) -> str:
        kind = "training step (forward and backward)" if self.train else "inference"
        rows: list[tuple[str, ...]] = [("wall time, ms", *(_wall(t) for t in (self.before, self.after)))]
        if self.device.type == "cuda":
            rows.append(("GPU time, ms", *(f"{t.gpu_us / 1e3:.3f}" for t in (self.before, self.after))))
        rows.append(
            ("peak memory, MiB", *(f"{n / 2**20:.2f}" for n in (self.before_bytes, self.after_bytes)))
        )
        lines = [
            f"{kind}, input {list(self.shape)}, {self._precision()}, {_device_name(self.device)}",
            "",
            format_table(["", "before (ATen)", "after (optimized)"], rows),
            f"Medians of {self.before.runs} runs each, interleaved; p20 to p80 in brackets.",
            *self._layout_line(),
            f"Memory: {MEMORY_KINDS[self.device.type]}.",
            "",
            error_line("largest error of the output", self.output),
        ]
        if self.gradient is not None:
            lines.append(error_line("largest error of a gradient", self.gradient))
        # Its sentence on the gain, where `optimize` measured one, would be a second verdict.
        lines += ["", str(dataclasses.replace(self.report, gain=None))]
        counted = collections.Counter(self.explanations)
        if counted:
            cells = [(d.operation, d.backend, n, d.reason) for d, n in counted.items()]
            lines += ["", format_table(["operation", "ran on", "calls", "because"], cells)]
        return "\n".join([*lines, "", f"{self.verdict} {advice(self)}".rstrip()])

    def _precision(self) -> str:
        if self.computed is None:
            return name_of(self.dtype)
        return f"{name_of(self.dtype)} computed in {name_of(self.computed)}"

    def _layout_line(self) -> list[str]:
        slower = [f"{n}: {t.wall_us / 1e3:.3f} ms" for n, t in self.layouts.items() if n != self.layout]
        if not slower:
            return []
        return [
            f"Before is in {self.layout}, weights and images, the faster of both layouts ({slower[0]}). "
            "Converting the images is part of each time."
        ]


def _lead(model: nn.Module, values: Sequence[Any]) -> Tensor:
    """The first tensor of an example that a model can be checked on."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("the model is scripted or traced, its code compiled already; check it before that")
    lead = next((t for t in values if isinstance(t, Tensor)), None)
    if lead is None:
        raise UserError("example must be a tensor or hold one")
    if lead.device.type not in MEMORY_KINDS:
        raise UserError(f"example must be on a CPU or a CUDA GPU, got {lead.device}")
    if any(map(nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        raise UserError("the model has lazy layers, which have no weights yet; run it once before the check")
    return lead


def _copied(model: nn.Module, train: bool) -> nn.Module:
    try:
        copied = copy.deepcopy(model).train(train)
    except Exception as error:
        raise UserError(f"the model cannot be deep-copied, which check needs: {describe(error)}") from error
    if train and not any(p.requires_grad for p in copied.parameters()):
        raise UserError("train: the model has no parameter that requires a gradient")
    return copied


def _first_run(run: Callable[[], Any], values: Sequence[Any]) -> Any:
    try:
        return run()
    except UserError:
        raise
    except Exception as error:
        tensors = [t for t in values if isinstance(t, Tensor)]
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        what = f"an input of shape {shapes}, {name_of(tensors[0].dtype)}"
        raise UserError(f"the model does not accept {what}: {describe(error)}") from error


def check_model(
    model: nn.Module,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    train: bool = False,
    compute: torch.dtype | None = None,
    budget_s: float = 5.0,
) -> CheckResult:
    """Run copies of `model` before and after `segfast.optimize` on `example` and compare them.

    Before is the model on ATen, segfast's own layers in it included, in NCHW or in channels_last, whichever
    is faster; after is the optimized copy under the current backend. Both are given `example` as it is: a
    conversion of the images is part of either time. Without `train`, in eval mode and without gradients; with
    it, in train mode, forward and backward from the same random gradient of the outputs. `model` itself, its
    gradients and the random state stay as they are.

    Args:
        model: any module.
        example: its input, a tuple of its positional arguments, or a dict of its keyword arguments, on the
            model's device.
        train: compare gradients too and time training steps.
        compute: `segfast.optimize`'s `dtype`, of the model after; its outputs may be off by that dtype's
            rounding.
        budget_s: seconds to spend on timing; five runs of each are made however long they take.

    Raises:
        UserError: the model is scripted, has lazy layers, cannot be copied, does not accept `example`, or
            returns no floating-point tensor.

    Example:
        >>> import torch
        >>> from segfast.commands.check import check_model
        >>> result = check_model(torch.nn.ConvTranspose2d(4, 4, 2, 2), torch.rand(1, 4, 8, 8), budget_s=0.01)
        >>> result.agrees
        True
    """
    inputs = arguments(example)
    values = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    lead = _lead(model, values)
    if train and compute is not None:
        raise UserError("compute: training computes in the dtype of the parameters; it is for inference")
    before = _copied(model, train)
    devices = [lead.device] if lead.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        plain = seeded(on_aten(Step(before, inputs, train)))
        reference = _first_run(plain, values)
        options: dict[str, Any] = {"dtype": compute, "train": train and lead.device.type == "cuda"}
        try:
            after = optimize(copy.deepcopy(model).train(train), inputs, inplace=True, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        ours = seeded(Step(after, inputs, train))
        result = ours()
        output = worst(floating(reference), floating(result))
        gradient = worst(_gradients(before), _gradients(after)) if train else None
        explanations = tuple(explain(ours))
        del reference, result
        befores = {"its own": before}
        if has_layouts(before, inputs):
            befores = dict(zip(LAYOUTS, (before, copy.deepcopy(model).train(train)), strict=True))
        plain_in = {name: laid_out(Step(m, inputs, train), LAYOUTS.get(name)) for name, m in befores.items()}
        times = interleave({**plain_in, "after": ours}, lead.device, budget_s=budget_s)
        layouts = {name: times[name] for name in befores}
        fastest = min(layouts, key=lambda name: layouts[name].wall_us)
        # Gradients left from above would be freed in the call and hide as much of its own memory.
        for m in (*befores.values(), after):
            m.zero_grad(set_to_none=True)
        plain_bytes, our_bytes = (peak_bytes(run, lead.device) for run in (plain_in[fastest], ours))
    return CheckResult(
        shape=tuple(lead.shape),
        dtype=lead.dtype,
        device=lead.device,
        train=train,
        output=output,
        gradient=gradient,
        layout=fastest,
        layouts=layouts,
        after=times["after"],
        before_bytes=plain_bytes,
        after_bytes=our_bytes,
        report=report(after),
        explanations=explanations,
        given=layout_of(model),
        compute=compute,
        computed=dtype_of(after),
    )


def _as_it_was(gain: Gain) -> str:
    before, after = (f"{ms:.1f} ms" for ms in (gain.before_ms, gain.after_ms))
    what = "step" if gain.train else "call"
    return f"{before} a {what} before ({gain.layout}), {after} optimized, so the model was left as it was"


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _wall(timing: Timing) -> str:
    return f"{timing.wall_us / 1e3:.3f} ({timing.wall_p20 / 1e3:.3f} to {timing.wall_p80 / 1e3:.3f})"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast check`."""
    parser.add_argument("model", metavar="MODEL", help=f"one of {FORMS}")
    parser.add_argument("--size", required=True, metavar="HxW", help="height and width of the input")
    parser.add_argument("--batch", type=int, default=1, help="images a call (1)")
    parser.add_argument("--channels", type=int, help="of the input (the first Conv2d's)")
    parser.add_argument("--train", action="store_true", help="compare gradients, time forward and backward")
    parser.add_argument(
        "--dtype", default="float32", help="float32, float16, bfloat16 or float64, or fp32, ... (float32)"
    )
    parser.add_argument(
        "--compute",
        metavar="DTYPE",
        help="bfloat16: optimize a float32 model to compute in it, with inputs and outputs as they are",
    )
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=5.0, help="time to spend on timing (5)")


def run(args: argparse.Namespace) -> int:
    """Run `segfast check`: 0 if the outputs agree, 1 if not."""
    height, width = parse_size(args.size)
    dtype, device = parse_dtype(args.dtype), parse_device(args.device)
    compute = None
    if args.compute is not None:
        compute = parse_dtype(args.compute, ("bfloat16",), "--compute")
        if args.train:
            raise UserError("--compute is for inference; leave out --train")
        if dtype != torch.float32:
            raise UserError(f"--compute is for a model in float32, got --dtype {args.dtype}")
    for name in ("batch", "channels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds must be positive and finite, got {args.seconds}")
    torch.manual_seed(0)
    model = load_model(args.model).to(device, dtype)
    channels = args.channels or input_channels(model)
    example = torch.randn(args.batch, channels, height, width, dtype=dtype, device=device)
    result = check_model(model, example, train=args.train, compute=compute, budget_s=args.seconds)
    print(f"segfast check {args.model}: {result}")
    return 0 if result.agrees else 1
