"""`segfast.nn.Conv2d` is `torch.nn.Conv2d` with an activation; `ConvBNAct` computes what its layers do."""

import copy
import pickle

import pytest
import torch
from torch import nn

import segfast
from segfast.nn import Conv2d, ConvBNAct
from tests.fused_conv import draw
from tests.separable_conv2d.test_module import results, trained


def twins(*args, **options):
    """The torch layer and ours, with the same parameters."""
    theirs, ours = nn.Conv2d(6, *args, **options), Conv2d(6, *args, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def operations(model, *args):
    return [explanation.operation for explanation in segfast.explain(model, *args)]


def test_a_list_of_images_is_their_concatenation():
    theirs, ours = twins(4, 3, padding=2, dilation=2)
    skip, up = draw(2, 4, 11, 12), draw(2, 2, 8, 8)
    joined = torch.cat([skip[:, :, 1:9, 2:10], up], 1)
    torch.testing.assert_close(ours([skip, up]), theirs(joined))


class TestClassSwap:
    def test_dilated_layers_become_ours_and_again_torchs(self):
        layers = [nn.Conv2d(6, 6, 3, dilation=d, groups=g) for d, g in (((1, 2), 1), (2, 2), (2, 6), (1, 1))]
        model = segfast.optimize(nn.Sequential(*layers))
        assert [type(m).__name__ for m in model] == ["Conv2d", "Conv2d", "DepthwiseConv2d", "Conv2d"]
        assert [type(m) is Conv2d for m in model] == [True, True, False, False]
        assert segfast.report(model).replaced == ["0", "1", "2"]
        assert [type(m) for m in segfast.restore(model)] == [nn.Conv2d] * 4

    def test_what_is_not_replaced_tells_why(self):
        layers = [
            nn.Conv2d(6, 6, 3, dilation=2, dtype=torch.float64),
            nn.Conv1d(6, 6, 3, dilation=2),
            nn.Conv3d(6, 6, 3, dilation=2),
            type("Own", (nn.Conv2d,), {})(6, 6, 3, dilation=2),
            Conv2d(6, 6, 3, groups=6),
            nn.Conv2d(6, 6, 3),
            nn.ConvTranspose2d(6, 6, 3, dilation=2, dtype=torch.float64),
        ]
        found = {row.name: row.reason for row in segfast.report(segfast.optimize(nn.Sequential(*layers)))}
        words = ("no kernels for float64", "one-dim", "three-dim", "a subclass of Conv2d", "segfast's own")
        assert all(word in found[str(index)] for index, word in enumerate(words))
        assert "subclass" not in found["4"]
        assert list(found) == ["0", "1", "2", "3", "4", "6"]


class TestConvBNAct:
    def test_torchvisions_names_and_geometry(self):
        block = ConvBNAct(6, 4, (3, 5), dilation=(2, 3))
        assert [name for name, _ in block.named_children()] == ["0", "1", "2"]
        assert block[0].bias is None and block[0].padding == (2, 6)
        assert [type(m) for m in ConvBNAct(6, 4, norm_layer=None)] == [Conv2d, nn.ReLU]
        assert len(ConvBNAct(6, 4, activation=None)) == 2
        assert ConvBNAct(6, 4, 4, dilation=2)(draw(2, 6, 9, 8)).shape == (2, 4, 9, 8)
        with pytest.raises(ValueError, match=r"kernel_size must be odd where no padding is given.*got 2"):
            ConvBNAct(6, 4, 2)
        with pytest.raises(ValueError, match="activation must be one of"):
            ConvBNAct(6, 4, activation="selu")

    @pytest.mark.parametrize("groups", [1, 2, 6])
    @pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_eval_is_one_operator_with_the_layers_result(self, fused_at_any_size, groups, grad, dtype):
        block = trained(ConvBNAct(6, 12, dilation=2, groups=groups, bias=True, dtype=dtype)).eval()
        x = draw(2, 6, 9, 8, dtype=dtype)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(block(x), nn.Sequential.forward(block, x))
        assert operations(block, x) == ["depthwise_conv2d" if groups == 6 else "conv2d"]

    def test_gradients_in_eval_and_train(self, fused_at_any_size):
        block, x = trained(ConvBNAct(6, 4, dilation=2)), draw(2, 6, 9, 8)
        for training in (False, True):
            block.train(training)
            plain = copy.deepcopy(block)
            torch.testing.assert_close(
                results(block, x, list(block.parameters())),
                results(lambda x, m=plain: nn.Sequential.forward(m, x), x, list(plain.parameters())),
                atol=1e-5,
                rtol=1e-4,
            )
            torch.testing.assert_close(block.state_dict(), plain.state_dict())

    @pytest.mark.parametrize(
        "norm_layer",
        [
            None,
            lambda c: nn.GroupNorm(2, c),
            nn.InstanceNorm2d,
            lambda c: nn.BatchNorm2d(c, track_running_stats=False),
            lambda c: nn.BatchNorm2d(c, affine=False),
        ],
    )
    def test_any_norm(self, fused_at_any_size, norm_layer):
        block, x = ConvBNAct(6, 4, norm_layer=norm_layer, activation="silu").eval(), draw(2, 6, 9, 8)
        torch.testing.assert_close(block(x), nn.Sequential.forward(block, x))

    def test_hooks_see_what_they_would_see(self, fused_at_any_size):
        block, x, seen = trained(ConvBNAct(6, 4)).eval(), draw(2, 6, 9, 8), []
        expected = block[1](block[0](x))
        block[1].register_forward_hook(lambda m, a, y: seen.append(y.clone()))
        block(x)
        torch.testing.assert_close(seen, [expected])

    def test_what_is_remembered_follows_the_parameters(self, fused_at_any_size):
        block, x = trained(ConvBNAct(6, 4, bias=True)).eval(), draw(2, 6, 9, 8)
        with torch.no_grad():
            for change in (
                lambda: None,
                lambda: block[1].weight.mul_(2),
                lambda: block[1].running_mean.add_(1),
                lambda: block[0].bias.add_(1),
                lambda: block.load_state_dict(trained(ConvBNAct(6, 4, bias=True)).state_dict()),
                lambda: setattr(block[1], "eps", 0.1),
                lambda: block.double(),
            ):
                change()
                x = x.to(block[0].weight.dtype)
                torch.testing.assert_close(block(x), nn.Sequential.forward(block, x))
            block[1].weight.data.fill_(3)
            block.eval()
            torch.testing.assert_close(block(x), nn.Sequential.forward(block, x))

    def test_a_list_of_images(self, fused_at_any_size):
        skip, up = draw(2, 4, 8, 8), draw(2, 2, 8, 8)
        for groups in (1, 6):
            block = trained(ConvBNAct(6, 12, groups=groups)).eval()
            with torch.no_grad():
                torch.testing.assert_close(block([skip, up]), block(torch.cat([skip, up], 1)))

    @pytest.mark.compat
    def test_copies_compilation_and_export(self, fused_at_any_size):
        block, x = trained(ConvBNAct(6, 4, dilation=2)).eval(), draw(2, 6, 9, 8)
        copies = (copy.deepcopy(block), pickle.loads(pickle.dumps(block)))
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            for other in (*copies, compiled, torch.export.export(block, (x,)).module()):
                torch.testing.assert_close(other(x), block(x), atol=1e-5, rtol=1e-5)

    @pytest.mark.interpreter
    def test_our_kernels(self, poisoned_empty):
        block, x = trained(ConvBNAct(6, 4, dilation=2)).eval(), draw(2, 6, 5, 6, channels_last=True)
        with torch.no_grad(), segfast.backend("triton"):
            y = block(x)
        torch.testing.assert_close(y, nn.Sequential.forward(block, x), atol=1e-5, rtol=1e-5)
