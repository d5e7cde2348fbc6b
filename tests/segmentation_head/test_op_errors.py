"""Arguments that the segmentation head refuses, and memory it does not take: the full-size logits."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.commands._memory import peak_bytes
from segfast.functional import upsample_argmax, upsample_cross_entropy, upsample_dice
from segfast.ops.segmentation_head import chunked
from tests.fused_conv import BACKENDS, INTERPRETING_ONLY, draw


@pytest.fixture(autouse=True)
def tiles_for_all(monkeypatch):
    """Tiles on a CPU, however little there is to compute."""
    monkeypatch.setattr(chunked, "worth_tiling", lambda *call: True)


def _logits(*shape, **options):
    return torch.zeros(shape or (1, 3, 2, 2), **options)


def _target(*shape, dtype=torch.int64, **options):
    return torch.zeros(shape or (1, 4, 4), dtype=dtype, **options)


# Logits, target, options; what torch raises, and the word by which the message names what is wrong.
ERRORS = {
    "logits ndim": (_logits(3, 2, 2), _target(), {}, RuntimeError, "logits"),
    "logits dtype": (_logits(dtype=torch.int64), _target(), {}, RuntimeError, "floating"),
    "no pixels": (_logits(1, 3, 0, 2), _target(), {}, RuntimeError, "logits"),
    "mode": (_logits(), _target(), {"mode": "cubic"}, ValueError, "mode"),
    "align_corners": (_logits(), _target(), {"mode": "nearest", "align_corners": True}, ValueError, "align"),
    "both sizes": (_logits(), _target(), {"size": 4, "scale_factor": 2}, ValueError, "scale_factor"),
    "three sizes": (_logits(), _target(), {"size": (4, 4, 4)}, ValueError, "size"),
    "fractional size": (_logits(), _target(), {"size": 4.5}, (ValueError, TypeError), "size|float"),
    "zero size": (_logits(), _target(), {"size": 0}, RuntimeError, "size"),
    "scale_factor": (_logits(), _target(), {"scale_factor": -2.0}, ValueError, "scale_factor"),
    "scale_factor to nothing": (_logits(), _target(), {"scale_factor": 0.3}, RuntimeError, "size"),
    "target ndim": (_logits(), _target(4, 4), {"size": 4}, RuntimeError, "target"),
    "target size": (_logits(), _target(), {"size": 5}, RuntimeError, "target"),
    "target batch": (_logits(), _target(2, 4, 4), {}, RuntimeError, "target"),
    "target of probabilities": (_logits(), _target(dtype=torch.float32), {}, RuntimeError, "target"),
    "soft target": (_logits(), torch.full((1, 3, 4, 4), 1 / 3), {}, RuntimeError, "target must hold class"),
    "soft target, size": (_logits(), torch.ones(1, 3, 4, 4), {"size": 4}, RuntimeError, "target must hold"),
    "target 4-D": (_logits(), _target(1, 1, 4, 4), {}, RuntimeError, r"target must be \[N, H, W\]"),
    "target 4-D, size": (_logits(), _target(1, 1, 4, 4), {"size": 4}, RuntimeError, "target must be"),
    "target device": (_logits(), _target(device="meta"), {}, RuntimeError, "device"),
}
LOSS_ERRORS = {
    "reduction": ({"reduction": "average"}, ValueError, "reduction"),
    "label_smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
    "weight length": ({"weight": torch.ones(4)}, RuntimeError, "weight"),
    "weight dtype": ({"weight": torch.ones(3, dtype=torch.int64)}, RuntimeError, "weight"),
    "weight device": ({"weight": torch.ones(3, device="meta")}, RuntimeError, "device"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name, backend):
    logits, target, options, error, word = ERRORS[name]
    with segfast.backend(backend):
        for function in (upsample_cross_entropy, upsample_dice):
            with pytest.raises(error, match=word):
                function(logits, target, **options)
        if "target" not in name:
            with pytest.raises(error, match=word):
                sized = "size" in options or "scale_factor" in options
                upsample_argmax(logits, **options, **({} if sized else {"size": 4}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSS_ERRORS)
def test_errors_of_the_loss_name_the_argument(name, backend):
    options, error, word = LOSS_ERRORS[name]
    with segfast.backend(backend), pytest.raises(error, match=word):
        upsample_cross_entropy(_logits(), _target(), **options)


def test_argmax_wants_a_size():
    with pytest.raises(ValueError, match="size or scale_factor"):
        upsample_argmax(_logits())


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_an_index_error(label):
    for function in (upsample_cross_entropy, upsample_dice):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            function(_logits(), _target() + label)


@INTERPRETING_ONLY
def test_what_the_kernels_do_not_serve_is_refused_by_name():
    with segfast.backend("triton"):
        many, wide = _logits(1, 1025, 1, 1), _logits(dtype=torch.float64)
        for logits, word in ((many, "1025 classes"), (wide, "float64")):
            with pytest.raises(NotImplementedError, match=word):
                upsample_argmax(logits, 4)
            with pytest.raises(NotImplementedError, match=word):
                upsample_cross_entropy(logits, _target(logits.shape[0], 4, 4))
            with pytest.raises(NotImplementedError, match=word):
                upsample_dice(logits, _target(logits.shape[0], 4, 4))


def test_memory_of_the_full_size_logits_is_not_taken():
    """The claim: 150 classes, 16x16 to 512x512, batch 4: a step takes a twentieth of the pair's memory."""
    logits = draw(4, 150, 16, 16).requires_grad_()
    target = torch.arange(4 * 512 * 512).view(4, 512, 512) * 7919 % 150

    def ours():
        return torch.autograd.grad(upsample_cross_entropy(logits, target), logits)

    def pair():
        z = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        return torch.autograd.grad(F.cross_entropy(z, target), logits)

    # What torch allocates: the resident set of the process depends on what else the machine holds.
    gradients, taken = [], []
    for step in (ours, pair):
        taken.append(peak_bytes(lambda step=step: gradients.extend(step()), torch.device("cpu")))
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-3)
    assert taken[1] > 2 * 4 * target.numel() * 150  # two full-size tensors at least
    assert 20 * taken[0] <= taken[1]
