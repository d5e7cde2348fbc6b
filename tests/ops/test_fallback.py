"""A kernel that does not compile or launch: under "auto" ATen computes instead, and says so once."""

import sys
import warnings

import pytest
import torch

import segfast
import segfast.functional as sf
from segfast.kernels import KernelError
from segfast.kernels._launch import Launch
from segfast.ops import OPERATORS, _backend

pytestmark = pytest.mark.interpreter


def draw(*shape):
    t = torch.randn(shape)
    return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()


LABELS = torch.randint(4, (1, 8, 8), generator=torch.Generator().manual_seed(0))
IMAGE = (1, 8, 4, 5)
# Each family's functions and inputs.
CALLS = {
    "conv2d": lambda: (sf.conv2d, draw(*IMAGE), draw(8, 8, 3, 3), draw(8)),
    "conv2d of images": lambda: (
        lambda a, b, w: sf.conv2d([a, b], w), draw(*IMAGE), draw(*IMAGE), draw(8, 16, 3, 3)
    ),
    "parallel_conv2d": lambda: (
        lambda x, *w: sf.parallel_conv2d(x, list(w), [1, 2]), draw(*IMAGE), draw(8, 8, 1, 1), draw(8, 8, 3, 3)
    ),
    "conv_transpose2d": lambda: (sf.conv_transpose2d, draw(*IMAGE), draw(8, 4, 2, 2), draw(4)),
    "up_concat": lambda: (sf.up_concat, draw(*IMAGE), draw(1, 4, 8, 10), draw(8, 4, 2, 2)),
    "depthwise_conv2d": lambda: (sf.depthwise_conv2d, draw(*IMAGE), draw(8, 1, 3, 3), draw(8)),
    "separable_conv2d": lambda: (sf.separable_conv2d, draw(*IMAGE), draw(8, 1, 3, 3), draw(8, 8, 1, 1)),
    "packed_max_pool2d": lambda: (lambda x: sf.packed_max_pool2d(x)[0], draw(*IMAGE)),
    "packed_max_unpool2d": lambda: (
        lambda x: sf.packed_max_unpool2d(x, torch.zeros(1, 2, 4, 5, dtype=torch.uint8)), draw(*IMAGE)
    ),
    "upsample_cross_entropy": lambda: (lambda x: sf.upsample_cross_entropy(x, LABELS), draw(1, 4, 2, 2)),
    "upsample_dice": lambda: (lambda x: sf.upsample_dice(x, LABELS), draw(1, 4, 2, 2)),
    "upsample_argmax": lambda: (lambda x: sf.upsample_argmax(x, scale_factor=2).double(), draw(1, 4, 2, 2)),
    "gaussian_filter": lambda: (
        lambda v, f: sf.gaussian_filter(v, f, method="exact"), draw(1, 2, 30), draw(1, 3, 30)
    ),
    "mean_field": lambda: (
        lambda u, i: sf.mean_field(u, i, iterations=1, method="exact"), draw(1, 3, 4, 5), draw(1, 3, 4, 5)
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def proven(monkeypatch):
    """All kernels proven and chosen; what a test makes fail is forgotten after it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("segfast.ops"):
            for question in ("kernel_reason_not", "_unproven"):
                if hasattr(module, question):
                    monkeypatch.setattr(module, question, lambda *args, **kwargs: None)
            if name.endswith((".functional", "._gpu")) and hasattr(module, "reason_not"):
                monkeypatch.setattr(module, "reason_not", lambda name, chosen: None)
    kernels = {name: operator._kernels for name, operator in OPERATORS.items()}
    yield
    _backend.FAILED.clear()
    for name, operator in OPERATORS.items():
        operator._kernels = kernels[name]


@pytest.fixture
def broken(monkeypatch):
    """broken(part): from now on kernels with `part` in their names fail. Returns what is launched then."""
    original, launches = Launch._launch, []

    def patch(part, message="PTX assembly aborted"):
        def failing(launch, pointers, index):
            launches.append(launch.kernel.__name__)
            if part in launch.kernel.__name__:
                raise RuntimeError(message)
            return original(launch, pointers, index)

        monkeypatch.setattr(Launch, "_launch", failing)
        return launches

    return patch


def run(name):
    """The result and the gradients of all inputs, on numbers that are the same each time."""
    torch.manual_seed(0)
    function, *inputs = CALLS[name]()
    result = function(*inputs)
    if not result.requires_grad:
        return (result,)
    return result, *torch.autograd.grad(result, inputs, torch.ones_like(result))


def close(actual, expected):
    # Where the forward is our kernel's: the exact filter's rounds to half precision.
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=5e-3, rtol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_aten_computes_what_every_kernel_fails_at(name, broken):
    with segfast.backend("aten"):
        expected = run(name)
    launches = broken("")
    with pytest.warns(
        RuntimeWarning, match=r"the kernel _\w+ could not be .*PTX assembly aborted.*segfast doctor"
    ):
        close(run(name), expected)
    tried = len(launches)
    assert tried >= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(run(name), expected)
    assert len(launches) == tried  # nothing is tried again


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("conv2d", "grad_weight"),
        ("conv_transpose2d", "conv2d_dense"),  # what the gradient of the input runs
        ("depthwise_conv2d", "grad_weight"),
        ("separable_conv2d", "grad_weight"),
        ("packed_max_pool2d", "unpool"),
        ("packed_max_unpool2d", "backward"),
        ("upsample_cross_entropy", "grad_logits"),
        ("upsample_dice", "grad_logits"),
        ("gaussian_filter", "grad_features"),
        ("mean_field", "grad_features"),
    ],
)
def test_aten_computes_a_gradient_whose_kernel_fails(name, part, broken):
    with segfast.backend("aten"):
        expected = run(name)
    launches = broken(part)
    with pytest.warns(RuntimeWarning, match=part):
        close(run(name), expected)
    assert not all(part in launch for launch in launches)  # the forward's are ours


@pytest.mark.parametrize("name", ["conv2d", "upsample_argmax", "mean_field"])
def test_by_name_the_error_is_raised(name, broken):
    broken("")
    with segfast.backend("triton"):
        with pytest.raises(KernelError, match="could not be compiled or launched") as raised:
            run(name)
        assert str(raised.value.__cause__) == "PTX assembly aborted"
    with pytest.warns(RuntimeWarning):
        run(name)
    # ... also where "auto" has given up.
    with segfast.backend("triton"), pytest.raises(KernelError):
        run(name)


def test_memory_that_is_full_and_wrong_arguments_are_the_callers(broken):
    broken("", "Triton Error [CUDA]: out of memory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="out of memory"):
            run("conv2d")
        with pytest.raises(RuntimeError, match="channels"):
            sf.conv2d(draw(1, 8, 4, 4), draw(8, 4, 3, 3))
    assert not _backend.FAILED


def test_explain_tells(broken):
    broken("")
    with pytest.warns(RuntimeWarning):
        run("upsample_argmax")
    explanation = segfast.explain(sf.upsample_argmax, draw(1, 4, 2, 2), scale_factor=2)[0]
    assert explanation.backend == "aten" and "PTX assembly aborted" in explanation.reason
