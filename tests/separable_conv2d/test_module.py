"""Depthwise layers are `torch.nn.Conv2d`; the blocks compute what their layers do one after the other."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import segfast
from segfast.nn import DepthwiseConv2d, InvertedResidual, SeparableConv2d
from segfast.nn._fused import eager, folding
from tests.fused_conv import REFERENCE_ACTIVATIONS, draw

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def results(function, x, parameters):
    """Output and every gradient, of a loss that tells the output's pixels apart."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    return y, torch.autograd.grad((y * draw(*y.shape, seed=3)).sum(), [x, *parameters])


def trained(module):
    """With statistics and affine parameters as training leaves them: no channel like another."""
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            if norm.running_mean is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.normal_(norm.bias)
    return module


def one_by_one(block, x, residual=None):
    """The result of a `SeparableConv2d`, from its layers by themselves."""
    x = REFERENCE_ACTIVATIONS[block.depthwise_activation](block.bn_dw(block.conv_dw(x)))
    x = block.bn_pw(block.conv_pw(x))
    return REFERENCE_ACTIVATIONS[block.activation](x if residual is None else x + residual)


pytestmark = pytest.mark.usefixtures("fused_at_any_size")


class TestDepthwise:
    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"groups must be in_channels \(6\) or None, got 3"):
            DepthwiseConv2d(6, 6, 3, groups=3)
        with pytest.raises(ValueError, match="out_channels"):
            DepthwiseConv2d(6, 8, 3)

    def test_groups_are_the_channels(self):
        assert DepthwiseConv2d(4, 8, 3).groups == 4

    def test_it_runs_our_operator(self):
        (explanation,) = segfast.explain(DepthwiseConv2d(6, 6, 3), draw(1, 6, 4, 4))
        assert explanation.operation == "depthwise_conv2d"


BLOCKS = {
    "relu": {"depthwise_activation": "relu", "activation": "relu"},
    "linear": {},
    "leaky": {"activation": "leaky_relu", "negative_slope": 0.2},
    "gelu, bias": {"depthwise_activation": "gelu", "activation": "silu", "bias": True},
}


class TestSeparable:
    @staticmethod
    def block(**options):
        options = {"padding": 1, "norm_layer": nn.BatchNorm2d, **options}
        return trained(SeparableConv2d(6, 10, 3, **options))

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
    def test_it_is_its_layers_one_by_one(self, options, training):
        block = self.block(**options).train(training)
        twin = copy.deepcopy(block)
        x, residual = draw(2, 6, 8, 7), draw(2, 10, 8, 7)
        expected = results(lambda x: one_by_one(twin, x, residual), x, twin.parameters())
        actual = results(lambda x: block(x, residual), x, block.parameters())
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(block.state_dict(), twin.state_dict())

    @pytest.mark.parametrize("mode", PADDING_MODES)
    def test_padding_modes_in_the_fused_operator(self, mode):
        block = self.block().eval()
        block.conv_dw = DepthwiseConv2d(6, 6, 3, padding=1, padding_mode=mode)
        torch.testing.assert_close(block(draw(1, 6, 5, 5)), one_by_one(block, draw(1, 6, 5, 5)))

    def operations(self, block, *args):
        return [d.operation for d in segfast.explain(block, draw(1, 6, 5, 5), *args)]

    def test_eval_is_one_operator_and_so_is_train_without_norms(self):
        block = self.block()
        assert self.operations(block) == ["depthwise_conv2d"]
        assert self.operations(block.eval()) == ["separable_conv2d"]
        assert self.operations(self.block(norm_layer=None)) == ["separable_conv2d"]

    def test_what_cannot_be_folded_runs_one_by_one(self):
        batch = self.block(norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).eval()
        group = self.block(norm_layer=lambda c: nn.GroupNorm(2, c)).eval()
        for block in (batch, group):
            assert self.operations(block) == ["depthwise_conv2d"]
            torch.testing.assert_close(block(draw(2, 6, 5, 5)), one_by_one(block, draw(2, 6, 5, 5)))

    @pytest.mark.parametrize("child", ["conv_dw", "bn_dw", "conv_pw", "bn_pw"])
    def test_hooks_on_the_layers_see_what_they_always_saw(self, child):
        block, seen = self.block().eval(), []
        layer = getattr(block, child)
        handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        block(draw(1, 6, 5, 5))
        ((input, output),) = seen
        handle.remove()
        torch.testing.assert_close(layer(input), output)
        block(draw(1, 6, 5, 5))
        assert len(seen) == 1

    def test_small_images_on_the_cpu_run_one_by_one(self, monkeypatch):
        monkeypatch.setattr(eager, "_LEAST_ELEMENTS", 6 * 8 * 8)
        block = self.block().eval()
        operations = [segfast.explain(block, draw(1, 6, n, 8))[0].operation for n in (7, 8)]
        assert operations == ["depthwise_conv2d", "separable_conv2d"]

    def test_gradients_in_fp64_with_frozen_statistics(self):
        block = trained(SeparableConv2d(2, 3, padding=1, norm_layer=nn.BatchNorm2d, activation="silu"))
        block = block.double().eval()
        names, values = zip(*block.named_parameters(), strict=True)
        x = draw(1, 2, 3, 4, dtype=torch.float64).requires_grad_()

        def run(x, *values):
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *values))

    def test_the_children_are_timms(self):
        block = self.block(bias=True)
        assert [n for n, _ in block.named_children()] == ["conv_dw", "bn_dw", "conv_pw", "bn_pw"]
        plain = SeparableConv2d(6, 10)
        assert list(plain.state_dict()) == ["conv_dw.weight", "conv_pw.weight"] and plain.bn_dw is None

    def test_devices_and_dtypes(self):
        block = self.block(device="meta", dtype=torch.float64)
        assert {(t.device.type, t.dtype) for t in block.parameters()} == {("meta", torch.float64)}
        assert block.bn_pw.running_var.dtype == torch.float64

    def test_copies_and_repr(self):
        block = self.block(activation="leaky_relu", negative_slope=0.2).eval()
        assert "activation=leaky_relu, negative_slope=0.2" in repr(block)
        x = draw(1, 6, 5, 5)
        expected = block(x)
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            torch.testing.assert_close(twin(x), expected)
            with torch.no_grad():
                twin.bn_dw.weight.mul_(2)
            assert not torch.allclose(twin(x), expected)
            torch.testing.assert_close(block(x), expected)

    def test_unknown_activations_are_refused(self):
        for name in ("activation", "depthwise_activation"):
            with pytest.raises(ValueError, match="activation must be one of None, 'relu'"):
                SeparableConv2d(2, 2, **{name: "swish"})

    @pytest.mark.compat
    def test_it_compiles_and_exports(self):
        block = self.block(activation="relu").eval()
        x = draw(2, 6, 5, 5)
        expected = block(x)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(draw(3, 6, 5, 5)), block(draw(3, 6, 5, 5)))
        # What they saw is not remembered: the weights may change before the next call.
        with torch.no_grad():
            block.bn_dw.weight.mul_(2)
        torch.testing.assert_close(compiled(x), one_by_one(block, x))

    def test_symbolic_tracing_sees_its_layers(self):
        block = self.block(activation="relu").eval()
        traced = torch.fx.symbolic_trace(nn.Sequential(block))
        torch.testing.assert_close(traced(draw(1, 6, 5, 5)), block(draw(1, 6, 5, 5)))

    def test_autocast(self):
        block = self.block(activation="relu").eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = block(draw(1, 6, 5, 5)), one_by_one(block, draw(1, 6, 5, 5))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)

    @pytest.mark.interpreter
    def test_it_runs_our_kernels(self, poisoned_empty):
        block = self.block(depthwise_activation="relu", activation="relu").eval()
        x = draw(2, 6, 5, 5, channels_last=True)
        expected = one_by_one(copy.deepcopy(block), x)
        with segfast.backend("triton"):
            torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


class TestRememberedNorms:
    """The scale and shift are those of the norm as it is now."""

    @pytest.fixture
    def norm(self):
        return trained(nn.BatchNorm2d(3)).eval()

    @staticmethod
    def check(norm):
        scale, shift = folding.folded(norm)
        x = draw(2, 3, 4, 4).to(norm.running_var.dtype)
        torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], norm(x))

    def test_it_is_computed_once(self, norm):
        with torch.no_grad():
            assert folding.folded(norm).scale is folding.folded(norm).scale
        assert folding.folded(norm).scale.requires_grad
        norm.requires_grad_(False)
        assert folding.folded(norm).scale is folding.folded(norm).scale

    @pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
    def test_a_write_is_seen(self, norm, name):
        with torch.no_grad():
            self.check(norm)
            getattr(norm, name).add_(0.5)
            self.check(norm)
            norm.load_state_dict({**norm.state_dict(), name: torch.full((3,), 2.0)})
            self.check(norm)
            norm.load_state_dict({**norm.state_dict(), name: torch.full((3,), 3.0)}, assign=True)
            self.check(norm)
            norm.eps = 0.5
            self.check(norm)
            self.check(norm.double())

    @torch.no_grad()
    def test_a_write_through_data_is_seen_after_eval(self):
        block = TestSeparable.block().eval()
        block(draw(1, 6, 5, 5))
        block.bn_pw.weight.data.mul_(3)
        block.eval()
        torch.testing.assert_close(block(draw(1, 6, 5, 5)), one_by_one(block, draw(1, 6, 5, 5)))

    def test_what_inference_mode_left_can_be_trained_with(self, norm):
        norm.requires_grad_(False)
        with torch.inference_mode():
            folding.folded(norm)
        x = draw(2, 3, 4, 4).requires_grad_()
        (x * folding.folded(norm).scale[:, None, None]).sum().backward()

    def test_inference_tensors_have_no_version(self):
        with torch.inference_mode():
            self.check(trained(nn.BatchNorm2d(3)).eval())

    def test_without_affine_parameters_and_in_16_bits(self):
        self.check(trained_statistics(nn.BatchNorm2d(3, affine=False)).eval())
        scale, shift = folding.folded(trained(nn.BatchNorm2d(3)).half().eval())
        assert scale.dtype == shift.dtype == torch.float32

    def test_modules_are_not_kept_alive(self, norm):
        with torch.no_grad():
            folding.folded(norm)
        assert norm in folding._known
        before = len(folding._known)
        del norm
        twin = trained(nn.BatchNorm2d(3)).eval()
        with torch.no_grad():
            folding.folded(twin)
        assert len(folding._known) == before + 1  # the fixture holds the first
        del twin
        assert len(folding._known) == before


def trained_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


class TestInvertedResidual:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize(
        ("channels", "options"),
        [
            (6, {}),
            (10, {}),
            (6, {"stride": 2}),
            (6, {"expand_ratio": 1}),
            (6, {"dilation": 2, "kernel_size": 5}),
        ],
        ids=str,
    )
    def test_it_is_its_layers_one_by_one(self, channels, options, training):
        block = trained(InvertedResidual(6, channels, **options)).train(training)
        twin = copy.deepcopy(block)
        adds = channels == 6 and options.get("stride", 1) == 1
        expected = results(lambda x: (x if adds else 0) + twin.conv(x), draw(2, 6, 8, 7), twin.parameters())
        actual = results(block, draw(2, 6, 8, 7), block.parameters())
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(block.state_dict(), twin.state_dict())
        stride = options.get("stride", 1)
        assert actual[0].shape == (2, channels, -(-8 // stride), -(-7 // stride))

    def test_eval_is_one_operator_after_that_of_the_expansion(self):
        block = InvertedResidual(6, 6).eval()
        ran = [d.operation for d in segfast.explain(block, draw(1, 6, 5, 5))]
        assert ran == ["conv2d", "separable_conv2d"]
        assert [d.operation for d in segfast.explain(block.train(), draw(2, 6, 5, 5))] == ["depthwise_conv2d"]

    @pytest.mark.parametrize(
        "path", ["conv", "conv.0", "conv.0.1", "conv.1", "conv.1.1", "conv.1.2", "conv.2", "conv.3"]
    )
    def test_hooks_see_what_they_always_saw(self, path):
        block, seen = trained(InvertedResidual(6, 6)).eval(), []
        layer = block.get_submodule(path)
        handle = layer.register_forward_hook(
            lambda module, args, output: seen.append((args[0], output.clone()))
        )
        x = draw(1, 6, 5, 5)
        expected = x + nn.Sequential(*block.conv)(x)
        torch.testing.assert_close(block(x), expected)
        assert len(seen) in (1, 2)
        handle.remove()
        torch.testing.assert_close(layer(seen[-1][0].clone()), seen[-1][1])

    def test_an_activation_put_in_afterwards_is_used(self):
        block = trained(InvertedResidual(6, 10)).eval()
        for activation in (nn.GELU(approximate="tanh"), nn.LeakyReLU(0.3), nn.Tanh()):
            block.conv[1][2] = activation
            torch.testing.assert_close(block(draw(1, 6, 5, 5)), block.conv(draw(1, 6, 5, 5)))

    @pytest.mark.parametrize("kind", [nn.Identity, "twice"])
    def test_an_expansion_put_in_afterwards_is_used(self, kind):
        class Twice(nn.Sequential):
            def forward(self, input):
                return 2 * super().forward(input)

        block = trained(InvertedResidual(6, 10, expand_ratio=1 if kind is nn.Identity else 2)).eval()
        x = draw(1, 6, 5, 5)
        if kind is nn.Identity:
            block.conv.insert(0, nn.Identity())
        else:
            block.conv[0] = Twice(*block.conv[0])
        torch.testing.assert_close(block(x), block.conv(x))

    @pytest.mark.parametrize("activation", REFERENCE_ACTIVATIONS)
    def test_every_activation(self, activation):
        block = trained(InvertedResidual(4, 4, expand_ratio=2, activation=activation)).eval()
        act = REFERENCE_ACTIVATIONS[activation]
        if activation == "leaky_relu":
            act = nn.functional.leaky_relu  # at torch's slope
        expansion, depthwise, projection, norm = block.conv
        x = y = 3 * draw(1, 4, 5, 5)
        for layers in (expansion, depthwise):
            y = act(layers[1](layers[0](y)))
        torch.testing.assert_close(block(x), x + norm(projection(y)))

    def test_parameter_names_are_torchvisions(self):
        names = {n.rpartition(".")[0] for n, _ in InvertedResidual(6, 6).named_parameters()}
        assert names == {"conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1", "conv.2", "conv.3"}
        names = {n.rpartition(".")[0] for n, _ in InvertedResidual(6, 6, expand_ratio=1).named_parameters()}
        assert names == {"conv.0.0", "conv.0.1", "conv.1", "conv.2"}

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
            InvertedResidual(6, 6, stride=3)
        with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
            InvertedResidual(6, 6, kernel_size=4)
        with pytest.raises(ValueError, match="activation must be one of"):
            InvertedResidual(6, 6, activation="swish")


def test_the_activation_modules_are_the_functions():
    from segfast.nn._activation import activation_module, activation_name

    for name, slope in itertools.product(REFERENCE_ACTIVATIONS, (0.01, 0.2)):
        module = activation_module(name, slope)
        known, found = activation_name(module)
        assert known == name and (name != "leaky_relu" or found == slope)
    assert activation_name(nn.Tanh()) is None
