"""Faults that reading found, each held by the smallest call that showed it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.functional import conv_transpose2d, depthwise_conv2d, separable_conv2d, upsample_cross_entropy
from segfast.kernels import Tile, _tiles, override_tile
from tests.fused_conv import BACKENDS, draw


@torch.no_grad()
@pytest.mark.parametrize("bias", [torch.ones(1), torch.ones(())], ids=["one", "scalar"])
@pytest.mark.parametrize("options", [{"dilation": 2}, {"scale": torch.ones(8)}, {"shift": torch.ones(8)}])
def test_a_bias_that_only_broadcasts_is_refused(bias, options):
    x, weight = draw(1, 8, 40, 40), draw(8, 1, 3, 3)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[8\]"):
        depthwise_conv2d(x, weight, bias, **options)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[8\]"):
        separable_conv2d(x, weight, draw(4, 8, 1, 1), bias, dilation=options.get("dilation", 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_an_fp32_shift_passes_what_fp16_can_hold(backend):
    x = torch.ones(1, 1, 160, 160, dtype=torch.float16)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    shift = torch.zeros(1, requires_grad=True)
    with segfast.backend(backend):
        for function in (depthwise_conv2d, conv_transpose2d):
            y = function(x, weight, shift=shift)
            (grad,) = torch.autograd.grad(y, shift, torch.full_like(y, 4.0))
            assert grad.item() == 4 * 160 * 160  # above 65504


@pytest.mark.interpreter
def test_autocast_around_the_backward_changes_nothing():
    tensors = [draw(1, 4, 5, 5), draw(4, 1, 3, 3), draw(6, 4, 1, 1)]

    def gradients(autocast):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with segfast.backend("triton"):
            y = separable_conv2d(*leaves, padding=1, depthwise_activation="relu")
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                return torch.autograd.grad(y.square().sum(), leaves)

    for plain, cast in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, cast)


def test_forward_mode_of_the_head_is_torchs():
    logits, tangent = draw(2, 32, 16, 16), draw(2, 32, 16, 16, seed=1)
    labels = torch.arange(2 * 128 * 128).reshape(2, 128, 128) % 32

    def plain(z):
        return F.cross_entropy(F.interpolate(z, (128, 128), mode="bilinear"), labels)

    actual = torch.func.jvp(lambda z: upsample_cross_entropy(z, labels, (128, 128)), (logits,), (tangent,))
    expected = torch.func.jvp(plain, (logits,), (tangent,))
    torch.testing.assert_close(actual, expected)


def test_kernels_of_equal_area_are_measured_apart():
    square, strip = (_tiles.geometry_variant((1, 1), (1, 1), kernel) for kernel in ((3, 3), (1, 9)))
    assert square == "-s1d1" and strip == "-s1d1-k1x9"


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_an_epilogue_on_another_device_is_named(name):
    x, weight = draw(1, 4, 5, 5), draw(4, 1, 3, 3)
    with pytest.raises(RuntimeError, match=f"{name} must share a device, got cpu and meta"):
        depthwise_conv2d(x, weight, **{name: torch.ones(4, device="meta")})


@pytest.mark.interpreter
def test_filters_lie_where_they_like_and_are_not_copied():
    x = draw(1, 4, 6, 5, channels_last=True)
    filters = draw(4, 1, 3, 3)
    layouts = {
        "contiguous": filters,
        "channels_last": filters.contiguous(memory_format=torch.channels_last),
        "taps_major": filters.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        "sliced": torch.cat([filters, filters])[::2][:4].copy_(filters),
    }
    expected = F.conv2d(x, filters, padding=1, groups=4)
    for name, weight in layouts.items():
        with torch.no_grad(), segfast.backend("triton"), segfast.kernels.record_launches() as launches:
            depthwise_conv2d(x, weight, padding=1)
        (_, pointers) = launches[0]
        assert any(pointer is weight for pointer in pointers), name
        with segfast.backend("triton"):
            torch.testing.assert_close(depthwise_conv2d(x, weight, padding=1), expected, msg=name)


@pytest.mark.interpreter
def test_a_filter_of_more_taps_than_a_grid_has_rows():
    x, grad = draw(1, 1, 300, 300), draw(1, 1, 1, 1)
    weight = torch.zeros(1, 1, 300, 300, requires_grad=True)
    with segfast.backend("triton"), segfast.kernels.record_launches() as launches:
        torch.ops.segfast.depthwise_conv2d_grad_weight(grad, x, weight.detach(), (1, 1), (0, 0), (1, 1))
    assert launches and all(max(launch.grid[1:]) <= 65535 for launch, _ in launches)


def test_taps_that_meet_only_padding_are_not_multiplied_on_a_cpu():
    x, weight = draw(1, 4, 17, 17), draw(4, 1, 3, 3)

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        return counter.get_total_flops(), result

    def both(rate):
        ours, y = flops(lambda: depthwise_conv2d(x, weight, None, 1, rate, rate))
        plain, expected = flops(lambda: F.conv2d(x, weight, None, 1, rate, rate, 4))
        torch.testing.assert_close(y, expected)
        return plain, ours

    plain, ours = both(18)
    assert plain == 9 * ours  # of 3x3 taps the middle one is left
    plain, ours = both(16)
    assert plain == ours  # each tap meets a pixel


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "tile",
    [Tile(16, 16, 16, 4, 1, form="fused"), Tile(0, 0, 0, 1, 1, form="two kernels")],
    ids=lambda tile: tile.form,
)
def test_a_remembered_launch_takes_the_tensors_of_its_own_call(tile, monkeypatch):
    weight = draw(4, 1, 3, 3).permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    pointwise = draw(6, 4, 1, 1)
    inputs = [draw(1, 4, 6, 5, seed=seed, channels_last=True) for seed in (0, 1)]
    with segfast.backend("triton"), override_tile("separable_conv2d_forward", tile), torch.no_grad():
        results = [separable_conv2d(inputs[0], weight, pointwise, padding=1)]
        # The launchers are not asked again.
        monkeypatch.setattr(segfast.kernels, "separable_conv2d_forward", None)
        results.append(separable_conv2d(inputs[1], weight, pointwise, padding=1))
    for x, result in zip(inputs, results, strict=True):
        expected = F.conv2d(F.conv2d(x, weight, padding=1, groups=4), pointwise)
        torch.testing.assert_close(result, expected)
