"""A prepared call of fused layers holds only while nothing about them has changed."""

import gc

import pytest
import torch
from torch import nn

import segfast
from segfast.nn._fused import ready
from segfast.nn._fused.conv import FusedConv
from segfast.nn._fused.separable import FusedSeparable
from segfast.ops._choice import Choice, choices, collect
from segfast.ops._epilogue import ACTIVATIONS


def _layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 6, 1),
        nn.BatchNorm2d(6),
    ).eval()
    with torch.no_grad():
        for norm in (layers[1], layers[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return layers


def _dense(layers) -> FusedConv:
    return FusedConv(layers[3], layers[4], "relu")


def _pair(layers) -> FusedSeparable:
    return FusedSeparable(layers[0], layers[1], "relu6", layers[3], layers[4], "relu")


def _expected(fused, layers, x, residual=None):
    y = layers[3:](x) if isinstance(fused, FusedConv) else layers(x)
    return torch.relu(y if residual is None else y + residual)


@pytest.fixture(params=[_dense, _pair], ids=["dense", "pair"])
def fused(request):
    """A fused form whose calls of 9x7 pixels have a choice, and its layers."""
    layers = _layers()
    fused, x = request.param(layers), torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        for residual in (None, torch.randn(2, 6, 9, 7)):
            for each in (x, x.contiguous(memory_format=torch.channels_last)):
                with collect() as collected:
                    fused.run(each, residual)
                for call in collected.counts:
                    choices().add(call, Choice("onednn", {}))
    return fused, layers


def _check(fused, layers, x, residual=None, **tolerance):
    with torch.no_grad():
        actual = fused.run(x, residual)
        torch.testing.assert_close(actual, _expected(fused, layers, x, residual), **tolerance)


def test_it_is_kept_and_computes_the_same(fused):
    fused, layers = fused
    x, residual = torch.randn(2, 8, 9, 7), torch.randn(2, 6, 9, 7)
    for _ in range(2):
        _check(fused, layers, x)
        with torch.no_grad():
            assert fused.ready(x) is fused.ready(torch.randn(2, 8, 9, 7)) is not None
        _check(fused, layers, x, residual)
        _check(fused, layers, x.contiguous(memory_format=torch.channels_last), residual)


def _write_running_statistics(layers):
    layers[4].running_var.mul_(3)


def _write_weight(layers):
    layers[3].weight.mul_(2)


def _replace_weight(layers):
    layers[3].weight = nn.Parameter(layers[3].weight * 2)


def _replace_bias(layers):
    layers[3].bias = None


def _replace_buffer(layers):
    layers[4].running_mean = layers[4].running_mean + 1


def _change_padding(layers):
    layers[3].padding = (1, 1)


def _change_eps(layers):
    layers[4].eps = 0.5


CHANGES = (
    _write_running_statistics,
    _write_weight,
    _replace_weight,
    _replace_bias,
    _replace_buffer,
    _change_padding,
    _change_eps,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_what_changed_is_seen(change, fused):
    fused, layers = fused
    x = torch.randn(2, 8, 9, 7)
    _check(fused, layers, x)
    with torch.no_grad():
        change(layers)
    if change is _change_padding and isinstance(fused, FusedSeparable):
        with torch.no_grad():
            assert not fused.is_eligible()  # a 1x1 convolution with padding is another operator
        return
    _check(fused, layers, x)


def test_another_size_dtype_backend_or_grad_mode(fused):
    fused, layers = fused
    x = torch.randn(2, 8, 9, 7)
    _check(fused, layers, x)
    _check(fused, layers, torch.randn(1, 8, 12, 5))
    _check(fused, layers, torch.randn(3, 8, 1, 1))
    assert fused.run(x).requires_grad
    with torch.no_grad():
        assert fused.ready(x) is not None
        with segfast.backend("aten"):
            assert fused.ready(x) is None
        with collect():
            assert fused.ready(x) is None
        assert fused.ready(x[0]) is None
        assert fused.ready([x]) is None
    assert fused.ready(x) is None  # gradients are enabled
    _check(fused, layers, x)
    layers.double()
    _check(fused, layers, x.double())


def test_hooks_and_train_mode(fused):
    fused, layers = fused
    x = torch.randn(2, 8, 9, 7)
    _check(fused, layers, x)
    seen = []
    with torch.no_grad():
        handle = layers[3].register_forward_hook(lambda *_: seen.append(1))
        assert fused.ready(x) is None
        handle.remove()
        assert fused.ready(x) is not None
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        assert fused.ready(x) is None
        handle.remove()
        layers[4].train()
        assert fused.ready(x) is None


def test_a_write_through_data_is_seen_after_eval(fused):
    fused, layers = fused
    blocks = segfast.nn.ConvBNAct(8, 6, 1)  # whose eval() tells that
    blocks[0], blocks[1] = layers[3], layers[4]
    x = torch.randn(2, 8, 9, 7)
    _check(fused, layers, x)
    layers[3].weight.data.mul_(2)
    blocks.eval()
    _check(fused, layers, x)


def test_autocast(fused):
    fused, layers = fused
    x = torch.randn(2, 8, 9, 7)
    _check(fused, layers, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.run(x).dtype == torch.bfloat16
    _check(fused, layers, x)


def test_nothing_is_kept_of_layers_that_are_gone(fused):
    fused, layers = fused
    x = torch.randn(2, 8, 9, 7)
    _check(fused, layers, x)
    first = layers[3] if isinstance(fused, FusedConv) else layers[0]
    key = id(first)
    assert len(ready._made[key]) == 1


def test_what_other_threads_may_be_looking_through_stays(fused):
    fused, layers = fused
    key = id(layers[3] if isinstance(fused, FusedConv) else layers[0])
    first, second = torch.randn(2, 8, 9, 7), torch.randn(1, 8, 9, 7)
    for x in (first, second):
        _check(fused, layers, x)
    seen = ready._made[key]
    before = list(seen)
    _check(fused, layers, first)
    assert ready._made[key] == before[::-1]
    assert seen == before


def test_a_model_that_is_gone_leaves_nothing():
    def make():
        layers = _layers()
        with torch.no_grad(), collect() as collected:
            _dense(layers).run(torch.randn(1, 8, 4, 4))
        for call in collected.counts:
            choices().add(call, Choice("onednn", {}))
        with torch.no_grad():
            _dense(layers).run(torch.randn(1, 8, 4, 4))
        assert id(layers[3]) in ready._made

    gc.collect()
    before = len(ready._made)
    make()
    gc.collect()
    assert len(ready._made) == before


def _remember(run) -> None:
    """A choice for every call that `run` makes."""
    with torch.no_grad(), collect() as collected:
        run()
    for call in collected.counts:
        choices().add(call, Choice("onednn", {}))


def test_what_shares_a_convolution_is_told_apart():
    layers = _layers()
    other = nn.BatchNorm2d(6).eval()
    fused_layers = [
        FusedConv(layers[3], layers[4], "relu"),
        FusedConv(layers[3], other, "relu"),
        FusedConv(layers[3], None, "silu"),
    ]
    fused_layers.append(FusedConv(layers[3], layers[4], "silu"))  # but for the activation the first one
    fused_layers += [FusedConv(layers[3], layers[4], "leaky_relu", slope) for slope in (0.1, 0.5)]
    x = torch.randn(1, 8, 6, 5)
    for fused in fused_layers:
        _remember(lambda fused=fused: fused.run(x))
    for fused in [*fused_layers, *reversed(fused_layers)]:
        with torch.no_grad():
            y = layers[3](x)
            y = y if fused.norm is None else fused.norm(y)
            activation = nn.functional.silu if fused.activation == "silu" else torch.relu
            if fused.activation == "leaky_relu":
                activation = lambda t, fused=fused: nn.functional.leaky_relu(t, fused.negative_slope)  # noqa: E731
            assert fused.ready(x) is not None
            torch.testing.assert_close(fused.run(x), activation(y), rtol=1e-4, atol=1e-5)


def test_a_layer_of_a_block_that_was_replaced():
    block = segfast.nn.ConvBNAct(8, 8).eval()
    x = torch.randn(1, 8, 6, 5)
    _remember(lambda: block(x))
    for change in (
        lambda: None,
        lambda: setattr(block, "2", nn.SiLU()),
        lambda: setattr(block, "2", nn.LeakyReLU(0.2)),
        lambda: setattr(block[2], "negative_slope", 0.7),
        lambda: setattr(block, "1", nn.BatchNorm2d(8).eval()),
    ):
        old = block[1]
        change()
        _remember(lambda: block(x))
        with torch.no_grad():
            expected = block[2](block[1](nn.functional.conv2d(x, block[0].weight, padding=1)))
            for _ in range(2):
                torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
        assert old is not None


def test_a_shorter_option_is_told_apart_from_a_longer_one():
    layers = nn.Sequential(*_layers(), nn.ReLU()).eval()
    del layers[1:3]  # depthwise, 1x1, norm, activation
    x = torch.randn(1, 8, 6, 5)
    fast = segfast.optimize(layers, x)
    _remember(lambda: fast(x))
    seen = []
    handle = fast[2].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        _remember(lambda: fast(x))
        for _ in range(3):
            torch.testing.assert_close(fast(x), layers(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 4
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layers(x), rtol=1e-4, atol=1e-5)


def test_parameters_that_stood_in_for_a_call_are_let_go():
    import weakref

    block = segfast.nn.ConvBNAct(8, 8).eval()
    x = torch.randn(1, 8, 6, 5)
    _remember(lambda: block(x))
    others = {name: p.detach().clone() for name, p in block.named_parameters()}
    with torch.no_grad():
        torch.func.functional_call(block, others, (x,))
    kept = [weakref.ref(t) for t in others.values()]
    del others
    with torch.no_grad():
        block(x)
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_a_weight_of_another_dtype_is_torchs_error():
    block = segfast.nn.ConvBNAct(8, 8, norm_layer=None).eval()
    x = torch.randn(1, 8, 6, 5)
    _remember(lambda: block(x))
    block.bfloat16()
    with torch.no_grad(), pytest.raises(RuntimeError):
        block(x)


def _alone() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "dense": segfast.nn.Conv2d(8, 6, 3, padding=1, activation="hardswish"),
        "depthwise": segfast.nn.DepthwiseConv2d(8, 8, 3, padding=1, activation="relu"),
        "transposed": segfast.nn.ConvTranspose2d(8, 6, 2, stride=2, activation="relu"),
    }


def _alone_expected(layer, x):
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    if layer.transposed:
        y = nn.functional.conv_transpose2d(x, weight, bias, layer.stride, layer.padding)
    else:
        y = nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, groups=layer.groups)
    return ACTIVATIONS[layer.activation](y, layer.negative_slope)


def _check_alone(layer, x, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(layer(x), _alone_expected(layer, x), **tolerance)


@pytest.fixture(params=["onednn", "aten", "nothing"])
def choice(request):
    return request.param


@pytest.fixture(params=list(_alone()))
def alone(request, choice):
    """A layer by itself, its calls of 9x7 pixels with a choice, and a call of another to have any."""
    layer, x = _alone()[request.param], torch.randn(2, 8, 9, 7)
    _remember(lambda: segfast.nn.Conv2d(3, 3, 1)(torch.randn(1, 3, 4, 4)))
    if choice != "nothing":
        with torch.no_grad(), collect() as collected:
            for each in (x, x.contiguous(memory_format=torch.channels_last)):
                layer(each)
        for call in collected.counts:
            choices().add(call, Choice(choice, {}))
    return layer


def test_a_layer_alone_is_kept_and_computes_the_same(alone, choice, monkeypatch):
    x = torch.randn(2, 8, 9, 7)
    given = x.clone()
    _check_alone(alone, x)
    (made,) = ready._made[id(alone)]
    assert made.possible() == (choice != "nothing")
    # From now on its operator is asked no more.
    for name in ("conv2d", "depthwise_conv2d", "conv_transpose2d"):
        monkeypatch.setattr(segfast.functional, name, None)
    _check_alone(alone, x)
    _check_alone(alone, x.contiguous(memory_format=torch.channels_last))
    assert made in ready._made[id(alone)]
    with segfast.backend("aten"):
        _check_alone(alone, x)
    torch.testing.assert_close(x, given, rtol=0, atol=0)


def test_what_changed_of_a_layer_alone_is_seen(alone):
    x = torch.randn(2, 8, 9, 7)
    for change in (
        lambda: alone.weight.mul_(2),
        lambda: alone.bias.add_(1),
        lambda: setattr(alone, "weight", nn.Parameter(alone.weight * 3)),
        lambda: setattr(alone, "activation", "sigmoid"),
        lambda: setattr(alone.bias, "data", alone.bias.data + 1),
        lambda: setattr(alone, "stride", (3, 3)),
    ):
        _check_alone(alone, x)
        with torch.no_grad():
            change()
        _check_alone(alone, x)


def test_a_layer_alone_where_it_is_not_to_run_so(alone):
    x = torch.randn(2, 8, 9, 7)
    _check_alone(alone, x)
    assert alone(x).requires_grad
    assert alone(x[0]).dim() == 3
    with torch.no_grad():
        assert segfast.explain(alone, x)
        with pytest.raises(RuntimeError, match="channels"):
            alone(torch.randn(2, 5, 9, 7))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert alone(x).dtype == torch.bfloat16
        ours = torch.func.vmap(alone)(x[None])[0]
        torch.testing.assert_close(ours, _alone_expected(alone, x))
        with pytest.raises(RuntimeError):
            alone(x.double())
    seen = []
    handle = alone.register_forward_hook(lambda *_: seen.append(1))
    _check_alone(alone, x)
    handle.remove()
    assert seen
    alone.double()
    _check_alone(alone, x.double())


def test_a_dilated_layer_alone_is_the_operators():
    layer = segfast.nn.Conv2d(4, 4, 3, padding=12, dilation=12)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad(), segfast.backend("aten"):
        expected = nn.functional.conv2d(x, layer.weight, layer.bias, 1, 12, 12)
        torch.testing.assert_close(layer(x), expected)
    assert not any(made.on_aten for made in ready._made.get(id(layer), ()))
