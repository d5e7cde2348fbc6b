"""`BilinearUpsample` is a bilinear transposed convolution, `UpsampleConv2d` interpolation and convolution."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from segfast.nn import BilinearUpsample, ConvTranspose2d, UpsampleConv2d
from segfast.nn.init import bilinear_
from tests.fused_conv import draw

# stride, kernel_size, padding, output_padding
GEOMETRY = {
    "x2": (2,),
    "x2 same size": (2, 4, 1),
    "x2 odd kernel": (2, 3, 1, 1),
    "x2 longer kernel": (2, 7, 2),
    "x8": (8, 16, 4),
    "x8 odd kernel, output_padding": (8, 15, 7, 7),
    "x3 is odd": (3,),
    "x1": (1, 3, 1),
    "kernel below stride": (8, 5),
    "kernel of one": (4, 1, 0, 3),
    "crop of all but the middle": (2, 8, 5),
    "x32": (32, 64, 16),
}


def transposed(
    channels, stride, kernel_size, padding=0, output_padding=0, cls=torch.nn.ConvTranspose2d, **options
):
    """The dense layer that `BilinearUpsample` stands for."""
    layer = cls(channels, channels, kernel_size, stride, padding, output_padding, bias=False, **options)
    bilinear_(layer.weight)
    return layer


def value_and_gradient(layer, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad((y * draw(*y.shape, seed=3)).sum(), x)
    return y, grad


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("cls", [torch.nn.ConvTranspose2d, ConvTranspose2d], ids=["torch", "segfast"])
@pytest.mark.parametrize("geometry", GEOMETRY.values(), ids=GEOMETRY)
def test_it_is_the_transposed_convolution_with_bilinear_weights(geometry, cls, channels_last):
    layer = BilinearUpsample(*geometry)
    dense = transposed(3, geometry[0], layer.kernel_size, *geometry[2:], cls=cls)
    x = draw(2, 3, 4, 5, channels_last=channels_last)
    (y, grad), (expected, expected_grad) = value_and_gradient(layer, x), value_and_gradient(dense, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, expected_grad, atol=2e-5, rtol=1e-5)
    assert y.stride() == expected.stride()


def test_the_default_kernel_is_fcns():
    assert [BilinearUpsample(s).kernel_size for s in (1, 2, 3, 8, 32)] == [1, 4, 5, 16, 64]


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 3), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 2, 2), (2, 3, 4, 1), (3, 4, 5)], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_sizes_of_one_none_and_no_batch(shape, channels_last):
    x = draw(*shape)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    y, expected = BilinearUpsample(4, 8, 2, 1)(x), transposed(shape[-3], 4, 8, 2, 1)(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()


def test_any_strides_go_in():
    x = draw(2, 3, 8, 10)[:, :, ::2, 1::2]
    y, expected = BilinearUpsample(2)(x), BilinearUpsample(2)(x.contiguous())
    assert torch.equal(y, expected) and y.is_contiguous()


def test_a_constant_image_stays_constant_inside():
    y = BilinearUpsample(8, padding=4)(torch.ones(1, 2, 5, 5))
    torch.testing.assert_close(y[..., 4:-4, 4:-4], torch.ones(1, 2, 32, 32))


def test_gradients_in_fp64():
    x = draw(1, 2, 2, 3, dtype=torch.float64).requires_grad_()
    for layer in (BilinearUpsample(2, 4, 1), BilinearUpsample(3, 2, 0, 1)):
        assert torch.autograd.gradcheck(layer, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_it_maps_over_another_batch(channels_last):
    x = draw(6, 2, 3, 4, channels_last=channels_last)
    layer = BilinearUpsample(2, 4, 1)
    y = torch.func.vmap(layer)(x.unflatten(0, (3, 2)))
    torch.testing.assert_close(y.flatten(0, 1), layer(x))


@pytest.mark.compat
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_it_compiles_whole(channels_last):
    layer = torch.nn.Sequential(BilinearUpsample(4, 8, 2), torch.nn.ReLU())
    x = draw(2, 3, 4, 5, channels_last=channels_last)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (y, grad), (expected, expected_grad) = value_and_gradient(compiled, x), value_and_gradient(layer, x)
    torch.testing.assert_close((y, grad), (expected, expected_grad))
    assert y.stride() == expected.stride()


@pytest.mark.compat
def test_it_exports_with_any_batch_and_size():
    layer = BilinearUpsample(4, 8, 2)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(layer, (draw(2, 3, 4, 5),), dynamic_shapes=(sizes,))
    assert not program.state_dict
    for shape in ((2, 3, 4, 5), (3, 3, 7, 6)):
        torch.testing.assert_close(program.module()(draw(*shape)), layer(draw(*shape)))


def test_there_is_nothing_to_learn_or_to_save():
    layer = BilinearUpsample(2)
    assert not list(layer.parameters()) and not layer.state_dict()
    layer.load_state_dict({}, strict=True)
    assert not layer(draw(1, 1, 2, 2)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_it_follows_the_dtype(dtype):
    x = draw(2, 3, 4, 5)
    expected = BilinearUpsample(4)(x)
    # The module may be cast or not: its kernel goes with the input.
    casts = (
        [lambda layer: layer] if dtype.is_complex else [lambda layer: layer, lambda layer: layer.to(dtype)]
    )
    for cast in casts:
        layer = cast(BilinearUpsample(4))
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        loose = (
            {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
            if dtype.itemsize == 2
            else {}
        )
        torch.testing.assert_close(y.to(torch.complex64).real, expected, **loose)
    assert BilinearUpsample(4).half().kernel.dtype == torch.float16
    torch.testing.assert_close(BilinearUpsample(4).half()(x), expected)


def test_it_goes_to_the_meta_device():
    x = draw(2, 3, 4, 5, channels_last=True)
    y = BilinearUpsample(8).to("meta")(x.to("meta"))
    expected = BilinearUpsample(8)(x)
    assert y.is_meta and y.shape == expected.shape and y.stride() == expected.stride()


def test_copies_and_repr():
    layer = BilinearUpsample(4, 7, 2, 1)
    assert repr(layer) == "BilinearUpsample(stride=4, kernel_size=7, padding=2, output_padding=1)"
    x = draw(1, 2, 3, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer) and torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("args", [(0,), (-2, 4), (2, 0), (2, 4, -1), (2, 4, 0, -1), (2, 4, 0, 2)], ids=str)
def test_bad_geometry_is_refused_at_once(args):
    with pytest.raises(ValueError, match="stride and kernel_size must be") as error:
        BilinearUpsample(*args)
    assert str(error.value).endswith(
        ", ".join(map(str, (*args, 0, 0)[:4])) if len(args) > 1 else "0, 0, 0, 0"
    )


def test_a_result_of_no_pixels_is_an_error():
    with pytest.raises(RuntimeError, match=r"output size 0 along axis -1 .*\[1, 1, 3, 2\]"):
        BilinearUpsample(2, 4, 3)(torch.ones(1, 1, 3, 2))


def test_whole_numbers_are_refused():
    # The kernel would round to zero.
    with pytest.raises(RuntimeError, match=r"dtype, got torch\.uint8"):
        BilinearUpsample(2)(torch.ones(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_upsample_conv_is_interpolate_and_convolution(kernel_size, scale, mode):
    layer = UpsampleConv2d(3, 4, kernel_size, scale_factor=scale, mode=mode)
    conv = torch.nn.Conv2d(3, 4, kernel_size, padding=(kernel_size - 1) // 2)
    layer.conv.load_state_dict(conv.state_dict())

    def composed(x):
        corners = {} if mode == "nearest" else {"align_corners": False}
        return conv(F.interpolate(x, size=[scale * n for n in x.shape[2:]], mode=mode, **corners))

    x = draw(2, 3, 4, 5)
    (y, grad), (expected, expected_grad) = value_and_gradient(layer, x), value_and_gradient(composed, x)
    torch.testing.assert_close((y, grad), (expected, expected_grad))
    assert y.shape == (2, 4, 4 * scale, 5 * scale)


def test_upsample_conv_defaults_to_twice_nearest_3x3():
    layer = UpsampleConv2d(2, 3)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "conv.weight": (3, 2, 3, 3),
        "conv.bias": (3,),
    }
    assert (layer.scale_factor, layer.mode) == (2, "nearest")
    assert "scale_factor=2, mode=nearest" in repr(layer)
    assert list(UpsampleConv2d(2, 3, bias=False).state_dict()) == ["conv.weight"]


def test_upsample_conv_takes_a_device_and_a_dtype():
    layer = UpsampleConv2d(2, 3, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    assert (
        UpsampleConv2d(2, 3, dtype=torch.float64)(draw(1, 2, 3, 3, dtype=torch.float64)).dtype
        == torch.float64
    )


def test_upsample_conv_keeps_channels_last():
    x = draw(1, 4, 3, 3, channels_last=True)
    assert UpsampleConv2d(4, 4)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"mode": "bicubic"}, "'nearest' or 'bilinear', got 'bicubic'"), ({"kernel_size": 4}, "odd, got 4")],
)
def test_upsample_conv_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        UpsampleConv2d(2, 3, **options)
