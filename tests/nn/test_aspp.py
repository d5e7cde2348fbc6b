"""`segfast.nn.ASPP` is torchvision's, in eval by few operators, in train also on one image."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import segfast
from segfast.commands._load_model import import_torchvision
from segfast.nn import ASPP, DepthwiseConv2d
from segfast.nn._fused.aspp import FusedASPP
from tests.fused_conv import draw
from tests.separable_conv2d.test_module import results, trained

RATES = (2, 3, 5)


pytestmark = pytest.mark.usefixtures("fused_at_any_size")


@pytest.fixture(scope="module")
def torchvisions():
    import_torchvision()
    from torchvision.models.segmentation.deeplabv3 import ASPP as theirs

    return theirs


def is_fused(model, x):
    """True if an ASPP in `model` is computed as a whole."""
    with (
        torch.no_grad(),
        mock.patch.object(FusedASPP, "run", autospec=True, side_effect=FusedASPP.run) as run,
    ):
        model(x)
    return run.called


def one_by_one(aspp, x):
    """The result of an ASPP, from its layers by themselves."""
    features = [branch_by_layers(branch, x) for branch in list(aspp.convs)[:-1]]
    pooled = nn.Sequential.forward(aspp.convs[-1], x)
    features.append(pooled.expand(-1, -1, *x.shape[2:]))
    return nn.Sequential.forward(aspp.project, torch.cat(features, 1))


def branch_by_layers(branch, x):
    for layer in branch:
        x = layer(x) if not isinstance(layer, nn.Sequential) else branch_by_layers(layer, x)
    return x


class TestTorchvisions:
    @pytest.mark.parametrize("rates", [(6, 12, 18), (2,), (1, 2, 3, 4)], ids=str)
    def test_parameters_and_results(self, torchvisions, rates):
        theirs = trained(torchvisions(6, rates, 4)).double().eval()
        ours = ASPP(6, rates, 4).double().eval()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for shape in ((2, 6, 9, 8), (1, 6, 7, 11), (3, 6, 1, 2)):
            x = draw(*shape, dtype=torch.float64)
            with torch.no_grad():
                torch.testing.assert_close(ours(x), theirs(x))
            assert is_fused(ours, x)
        theirs.load_state_dict(ours.state_dict(), strict=True)

    def test_one_training_step(self, torchvisions):
        theirs, ours = torchvisions(6, RATES, 4), ASPP(6, RATES, 4)
        ours.load_state_dict(theirs.state_dict())
        x, found = draw(3, 6, 9, 8), []
        for aspp in (theirs, ours):
            optimizer = torch.optim.SGD(aspp.parameters(), lr=0.1)
            for _ in range(2):
                torch.manual_seed(0)
                y = aspp(x)
                optimizer.zero_grad()
                (y * draw(*y.shape, seed=3)).sum().backward()
                optimizer.step()
            found.append((y.detach(), aspp.state_dict()))
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
        assert not torch.equal(found[1][1]["convs.4.2.running_mean"], torch.zeros(4))
        assert found[1][1]["convs.4.2.num_batches_tracked"] == 2

    def test_one_image_in_train_uses_the_pooled_norms_running_statistics(self, torchvisions):
        theirs, ours = trained(torchvisions(6, RATES, 4)).double(), ASPP(6, RATES, 4).double()
        ours.load_state_dict(theirs.state_dict())
        x = draw(1, 6, 9, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            copy.deepcopy(theirs)(x)
        theirs.convs[4][2].eval()
        for aspp in (theirs, ours):
            aspp.project[3].eval()
            aspp(x).square().sum().backward()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        gradients = [[p.grad for p in aspp.parameters()] for aspp in (ours, theirs)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("separable", [False, True], ids=["dense", "separable"])
class TestBothKinds:
    @pytest.fixture
    def aspp(self, separable):
        return trained(ASPP(6, RATES, 4, separable=separable)).eval()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
    def test_eval_is_what_its_layers_are(self, aspp, dtype, batch, channels_last):
        aspp, x = aspp.to(dtype), draw(batch, 6, 9, 8, dtype=dtype, channels_last=channels_last)
        with torch.no_grad():
            y = aspp(x)
        torch.testing.assert_close(y, one_by_one(aspp, x))
        assert is_fused(aspp, x)
        assert y.is_contiguous(memory_format=torch.channels_last) is channels_last

    def test_gradients_in_eval_and_train(self, aspp):
        x = draw(2, 6, 9, 8)
        for training in (False, True):
            aspp.train(training)
            aspp.project[3].eval()
            plain = copy.deepcopy(aspp)
            torch.testing.assert_close(
                results(aspp, x, list(aspp.parameters())),
                results(lambda x, m=plain: one_by_one(m, x), x, list(plain.parameters())),
                atol=1e-5,
                rtol=1e-4,
            )
            torch.testing.assert_close(aspp.state_dict(), plain.state_dict())

    def test_empty_batch(self, aspp):
        with torch.no_grad():
            assert aspp(draw(0, 6, 9, 8)).shape == (0, 4, 9, 8)

    def test_autocast(self, aspp):
        x = draw(2, 6, 9, 8)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = aspp(x)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), one_by_one(aspp, x), atol=0.1, rtol=0.1)

    def test_half_precision(self, aspp):
        x = draw(2, 6, 9, 8)
        expected = one_by_one(aspp, x)
        with torch.no_grad():
            y = aspp.bfloat16()(x.bfloat16())
        torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.1)

    @pytest.mark.compat
    def test_copies_compilation_and_export(self, aspp):
        x = draw(2, 6, 9, 8)
        with torch.no_grad():
            expected = aspp(x)
            copies = (copy.deepcopy(aspp), pickle.loads(pickle.dumps(aspp)))
            compiled = torch.compile(aspp, backend="aot_eager", fullgraph=True)
            for other in (*copies, compiled, torch.export.export(aspp, (x,)).module()):
                torch.testing.assert_close(other(x), expected, atol=1e-5, rtol=1e-5)
            expected = one_by_one(aspp, torch.stack([x, 2 * x]).flatten(0, 1)).unflatten(0, (2, 2))
            mapped = torch.func.vmap(aspp)(torch.stack([x, 2 * x]))
            torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=1e-5)

    def test_optimize_leaves_it_to_itself(self, aspp):
        x = draw(2, 6, 9, 8)
        model = segfast.optimize(nn.Sequential(aspp), x)
        rows = segfast.report(model)
        assert all("segfast's own already" in row.reason for row in rows) and not rows.fused
        assert is_fused(model, x)

    @pytest.mark.interpreter
    def test_our_kernels(self, aspp, poisoned_empty, small_tiles):
        x = draw(2, 6, 5, 6, channels_last=True)
        with torch.no_grad(), segfast.backend("triton"):
            y = aspp(x)
            assert is_fused(aspp, x)
        torch.testing.assert_close(y, one_by_one(aspp, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["convs.1.1", "convs.2", "convs.4", "convs.4.0", "project", "project.2"])
def test_hooks_see_what_they_would_see(path):
    aspp, x, seen = trained(ASPP(6, RATES, 4)).eval(), draw(2, 6, 9, 8), []
    with torch.no_grad():
        y = aspp(x)
        assert is_fused(aspp, x)
        handle = aspp.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y))
        assert not is_fused(aspp, x)
        torch.testing.assert_close(aspp(x), y)
        handle.remove()
        assert len(seen) == 2 and is_fused(aspp, x)


@pytest.mark.parametrize(
    "norm_layer", [lambda c: nn.GroupNorm(2, c), lambda c: nn.BatchNorm2d(c, affine=False)]
)
def test_any_norm(norm_layer):
    aspp, x = ASPP(6, RATES, 4, norm_layer=norm_layer).eval(), draw(2, 6, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(aspp(x), one_by_one(aspp, x))
    assert is_fused(aspp, x) is isinstance(norm_layer(4), nn.BatchNorm2d)


def test_dropout_left_in_train_drops():
    aspp, x = ASPP(6, RATES, 4, dropout=0.9).eval(), draw(2, 6, 9, 8)
    aspp.project[3].train()
    with torch.no_grad():
        assert is_fused(aspp, x)
        assert (aspp(x) == 0).float().mean() > 0.7


def test_what_is_remembered_follows_the_parameters():
    aspp, x = trained(ASPP(6, RATES, 4)).eval(), draw(2, 6, 9, 8)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: aspp.convs[1][0].weight.mul_(2),
            lambda: aspp.convs[4][2].running_var.mul_(2),
            lambda: aspp.project[0].weight.mul_(2),
            lambda: setattr(aspp.project[1], "eps", 0.1),
            lambda: setattr(aspp.convs[2][0], "dilation", (1, 1)) or setattr(aspp.convs[2][0], "padding", 1),
            lambda: aspp.convs.__setitem__(1, trained(ASPP(6, (7,), 4)).eval().convs[1]),
            lambda: aspp.double(),
        ):
            change()
            x = x.to(aspp.project[0].weight.dtype)
            torch.testing.assert_close(aspp(x), one_by_one(aspp, x), atol=1e-5, rtol=1e-5)
            assert is_fused(aspp, x)
        # What the fused form cannot: a branch of another size is still torch's error.
        aspp.convs[2][0].padding = (0, 0)
        with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"):
            aspp(x)


def test_other_activations():
    for activation in (None, "silu", "leaky_relu"):
        aspp, x = trained(ASPP(6, RATES, 4, activation=activation)).eval(), draw(2, 6, 9, 8)
        with torch.no_grad():
            torch.testing.assert_close(aspp(x), one_by_one(aspp, x), atol=1e-5, rtol=1e-5)
        assert is_fused(aspp, x)


def test_separable_names_are_smps():
    aspp = ASPP(6, RATES, 4, separable=True)
    assert type(aspp.convs[1][0][0]) is DepthwiseConv2d
    names = [name for name in aspp.state_dict() if name.startswith("convs.1.")]
    assert names[:3] == ["convs.1.0.0.weight", "convs.1.0.1.weight", "convs.1.1.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atrous_rates": []}, r"atrous_rates must be at least one dilation of 1 or more, got \(\)"),
        ({"atrous_rates": [6, 0]}, r"atrous_rates must be .* got \(6, 0\)"),
        ({"atrous_rates": [6], "activation": "selu"}, "activation must be one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ASPP(6, **options)
