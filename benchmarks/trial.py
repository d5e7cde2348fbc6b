"""A trial, a case on a device: inputs, calls of a function of them in its direction, and a right answer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from segfast.ops._case import Case, Tensors, changed
from segfast.ops._convolution_case import affine
from segfast.ops._gpu_measure import without_search

MOST_IN_FP64 = 2e11  # exponentials of a reference CRF

_WHOLE = ("upsample_cross_entropy", "upsample_dice")  # one result for the whole batch

Formula = Callable[[Tensors], torch.Tensor]

IMAGES = ("x", "skip", "residual", "unary", "image", "values", "features")
# Never differentiated: labels, places in windows, and of an eval-mode batch norm all, or what it comes to.
CONSTANT = ("mean", "var", "gamma", "beta", "scale", "shift", "labels", "indices", "places")


class Trial:
    """Random inputs of an operator's case on a device, channels_last where they are images or filters."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.formula: Formula = case.formula
        generator = torch.Generator(device).manual_seed(seed)
        self.tensors = {
            name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
            for name, value in case.inputs(device, case.torch_dtype, generator).items()
        }
        self.grad_output: torch.Tensor | None = None
        if case.direction != "forward":
            with torch.no_grad():
                output = self.formula(self.tensors)
            self.grad_output = torch.randn(
                output.shape, device=device, generator=generator, dtype=output.dtype
            )
            if output.dim() == 4:
                self.grad_output = self.grad_output.contiguous(memory_format=torch.channels_last)

    def contiguous(self) -> Tensors:
        return {name: value.contiguous() for name, value in self.tensors.items()}

    def wanted(self, tensors: Tensors) -> list[str]:
        """Names of the inputs whose gradient the case's direction asks for."""
        if self.case.direction == "grad_input":
            return ["x"]
        names = [name for name in tensors if not name.endswith(CONSTANT)]
        return (
            [name for name in names if name not in IMAGES] if self.case.direction == "grad_weight" else names
        )

    def bind(self, function: Formula, tensors: Tensors | None = None) -> Callable[[], Any]:
        """A call of `function` on `tensors` in the case's direction; gradients in the order of `wanted`."""
        tensors = dict(self.tensors if tensors is None else tensors)
        direction = self.case.direction
        if direction == "forward":

            def forward() -> torch.Tensor:
                with torch.no_grad():
                    return function(tensors)

            return forward
        wanted = self.wanted(tensors)
        leaves = [tensors[name].detach().requires_grad_() for name in wanted]
        tensors.update(zip(wanted, leaves, strict=True))
        grad_output = self.grad_output
        assert grad_output is not None
        if tensors["x"].is_contiguous() and grad_output.dim() == 4:
            grad_output = grad_output.contiguous()

        def gradients(output: torch.Tensor, keep: bool) -> tuple[torch.Tensor, ...]:
            grad = grad_output.to(output.dtype)
            return torch.autograd.grad(output, leaves, grad, retain_graph=keep)

        if direction == "train":
            return lambda: gradients(function(tensors), False)
        saved: list[torch.Tensor] = []

        def backward() -> tuple[torch.Tensor, ...]:
            # The forward pass runs once, in the first (warm-up) call.
            if not saved:
                saved.append(function(tensors))
            return gradients(saved[0], True)

        return backward

    def sample(self, output: Any) -> Any:
        """The part of an output that is compared: first and last image of a forward, all of a gradient.

        Of labels, whose ties may fall either way, the probability of what was chosen.
        """
        if self.case.op == "upsample_argmax":
            return self._probabilities().gather(1, output[self._images()][:, None])[:, 0]
        if self.case.direction == "forward" and self.case.op not in _WHOLE:
            return output[self._images()]
        return output

    def reference(self) -> Any:
        """`sample` of the right answer, in fp64; of a CRF with 1e11 pairs and more in fp32."""
        dtype = torch.float64 if self.case.exponentials < MOST_IN_FP64 else torch.float32
        tensors = changed(self.tensors, lambda value: value.to(dtype))
        if self.case.op == "upsample_argmax":
            return self._probabilities().amax(1)
        with without_search():
            if self.case.direction != "forward" or self.case.op in _WHOLE:
                return self.bind(self.formula, tensors)()
            images = self._images()
            batch = {name: tensors[name][images] for name in IMAGES if name in tensors}
            with torch.no_grad():
                return self.formula({**tensors, **batch})

    def _probabilities(self) -> torch.Tensor:
        """Softmax of the first and the last image's upsampled logits."""
        with torch.no_grad():
            x = self.tensors["x"][self._images()].double()
            return torch.softmax(self.case.upsampled({"x": x}), 1)  # type: ignore[attr-defined]

    def _images(self) -> Sequence[int]:
        return sorted({0, self.case["n"] - 1})


def folded(tensors: Tensors) -> Tensors:
    """The same layer with its batch norm folded into weight and bias, rounded to their dtype."""
    scale, shift = affine(tensors)
    weight = tensors["weight"]
    shape = (-1,) + (1,) * (weight.dim() - 1)
    return {
        **{name: tensors[name] for name in IMAGES if name in tensors},
        "weight": (weight.float() * scale.view(shape)).to(weight.dtype, memory_format=torch.preserve_format),
        "bias": shift.to(weight.dtype),
    }
