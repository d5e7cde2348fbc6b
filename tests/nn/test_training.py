"""Convolution, batch norm and activation in training: what the layers compute, with less memory."""

import copy
import socket

import pytest
import torch
from torch import nn

import segfast
from segfast.commands._memory import bytes_held, peak_bytes
from segfast.models.encoders.resnet import Bottleneck
from segfast.nn import Conv2d, ConvBNAct, DepthwiseConv2d, InvertedResidual, SeparableConv2d
from segfast.nn._fused import training
from segfast.nn._fused.conv import FusedConv
from segfast.nn._fused.layers import run_layers
from segfast.ops._kept import keeping_less
from tests.fused_conv import REFERENCE_ACTIVATIONS, draw
from tests.separable_conv2d.test_module import results, trained

ACTIVATIONS = tuple(REFERENCE_ACTIVATIONS)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The norms computed as one with what follows them, counted."""
    made = []
    begun = training._begun
    monkeypatch.setattr(training, "_begun", lambda norm: made.append(norm) or begun(norm))
    return made


def layer_by_layer(model, x):
    """The result of the model's layers, none of them fused."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("layers", "training"):
            patch.setattr(f"segfast.nn._fused.{module}.train_layers", lambda layers, x: None)
        for module in ("nn.separable_conv2d", "models.encoders.resnet", "nn._fused.training"):
            patch.setattr(f"segfast.{module}.may_train", lambda: False)
        patch.setattr("segfast.nn.separable_conv2d.train_layers", lambda layers, x: None)
        return model(x)


def assert_as_layers(model, x, tolerance=1e-11):
    """Outputs, gradients of the image and the parameters and buffers, after two steps."""
    plain = copy.deepcopy(model)
    for _ in range(2):
        ours = results(model, x, list(model.parameters()))
        theirs = results(lambda x: layer_by_layer(plain, x), x, list(plain.parameters()))
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=tolerance, rtol=tolerance)


def chain(count, channels=8, **options):
    return nn.Sequential(*[ConvBNAct(channels, channels, **options) for _ in range(count)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_gradients_and_statistics_are_the_layers(activation, calls):
    model = trained(chain(2, 6, activation=activation, negative_slope=0.2, bias=True, dtype=torch.float64))
    assert_as_layers(model, draw(2, 6, 5, 7, dtype=torch.float64))
    assert len(calls) == 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("remade", [False, True], ids=["kept", "remade"])
def test_what_is_added_before_the_activation(activation, remade, calls):
    """A residual that is made again itself is not kept, and the result is."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.norm = ConvBNAct(6, 6), Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x):
            residual = self.first(x)
            residual = residual if remade else residual * 2
            fused = FusedConv(self.conv, self.norm, activation, 0.2)
            if training.may_train():
                return fused.train(residual, residual)
            return REFERENCE_ACTIVATIONS[activation](self.norm(self.conv(residual)) + residual)

    assert_as_layers(trained(Block().double()), draw(2, 6, 5, 7, dtype=torch.float64))
    told = activation in (None, "relu", "leaky_relu", "relu6", "sigmoid")
    assert len(calls) == (4 if told else 2)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_options_of_the_norm(options, channels_last, calls):
    model = chain(2, 6, norm_layer=lambda c: nn.BatchNorm2d(c, **options)).double()
    x = draw(2, 6, 5, 7, dtype=torch.float64)
    if channels_last:
        model, x = (each.to(memory_format=torch.channels_last) for each in (model, x))
        assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert_as_layers(model, x)
    assert calls


@pytest.mark.parametrize(
    "model",
    [
        SeparableConv2d(6, 4, padding=1, norm_layer=nn.BatchNorm2d, activation="relu6"),
        InvertedResidual(6, 6, expand_ratio=2),
        nn.Sequential(Bottleneck(6, 2), Bottleneck(8, 2), Bottleneck(8, 2)),
        segfast.models.UNet(6, width=2, depth=2, norm="batch"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_blocks(model, calls):
    assert_as_layers(model.double().train(), draw(2, 6, 8, 8, dtype=torch.float64))
    assert len(calls) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_transposed_convolution_and_other_layers_between(calls):
    layers = [
        nn.ConvTranspose2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True),
        nn.Dropout2d(0.0), DepthwiseConv2d(4, 4, 3), nn.Sequential(nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1),
    ]  # fmt: skip

    class Layers(nn.Sequential):
        def forward(self, x):
            return run_layers(list(self), x) if training.may_train() else super().forward(x)

    assert_as_layers(Layers(*layers).double(), draw(2, 6, 4, 5, dtype=torch.float64))
    assert len(calls) == 4


def test_means_far_from_zero():
    """The statistics survive what their sums of squares would not."""
    block = ConvBNAct(3, 4, 1, bias=True)
    nn.init.constant_(block[0].bias, 1e4)
    exact = copy.deepcopy(block).double()
    x = draw(4, 3, 16, 16)
    torch.testing.assert_close(block(x).double(), exact(x.double()), atol=0.02, rtol=0)
    torch.testing.assert_close(block[1].running_var.double(), exact[1].running_var, rtol=1e-3, atol=0)


def test_one_value_a_channel_is_torchs_error():
    block, x = ConvBNAct(3, 4, 1), draw(1, 3, 1, 1)
    with pytest.raises(ValueError) as theirs:
        layer_by_layer(block, x)
    with pytest.raises(ValueError) as ours:
        block(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_gradients_of_gradients(activation):
    torch.manual_seed(0)
    model = chain(2, 2, activation=activation, dtype=torch.float64)
    x = draw(2, 2, 3, 3, dtype=torch.float64).requires_grad_()
    weights = [block[0].weight for block in model]

    def run(x, *_):
        return model(x)

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


def test_autocast(calls):
    model, x = chain(2, 6), draw(2, 6, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_as_layers(model, x, tolerance=2e-2)
    assert calls and model(x).dtype == torch.float32


def test_norms_of_16_bits_are_torchs(calls):
    block = ConvBNAct(6, 4).to(torch.bfloat16)
    assert_as_layers(block, draw(2, 6, 9, 8, dtype=torch.bfloat16), tolerance=0)
    assert not calls


def test_the_meta_device(calls):
    assert chain(2, 4).to("meta")(draw(2, 4, 6, 5).to("meta")).shape == (2, 4, 6, 5)
    assert not calls


def test_a_norm_in_eval_is_not_trained(calls):
    block = trained(ConvBNAct(6, 4).double())
    block[1].eval()
    before = copy.deepcopy(block.state_dict())
    assert_as_layers(block, draw(2, 6, 9, 8, dtype=torch.float64))
    torch.testing.assert_close(block.state_dict(), before)
    assert not calls


@pytest.mark.parametrize("watched", [0, 1, 2])
def test_hooks_see_what_they_would_see(watched, calls):
    block, x, seen = ConvBNAct(6, 4, activation="silu"), draw(2, 6, 9, 8), []
    block[watched].register_forward_hook(lambda m, a, y: seen.append(y))
    block(x).sum().backward()
    assert not calls and len(seen) == 1 and seen[0].requires_grad


def test_nothing_changes_without_gradients_and_under_transforms(calls):
    block, x = ConvBNAct(6, 4, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=0.5)), draw(2, 6, 9, 8)
    with torch.no_grad():
        block(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(block(dual)).tangent is not None
    assert not calls


def test_compiled_it_is_the_layers(calls):
    model, x = chain(2, 4).double(), draw(2, 4, 6, 5, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        results(compiled, x, list(compiled.parameters())), results(model, x, list(model.parameters()))
    )
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, calls):
    """Within one the layers run one by one."""
    from torch.utils.checkpoint import checkpoint

    model, x = chain(3, 4).double(), draw(2, 4, 6, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    theirs = results(lambda x: layer_by_layer(plain, x), x, list(plain.parameters()))

    def run(x):
        return model[2](checkpoint(model[:2], x, use_reentrant=reentrant))

    if not reentrant:  # which takes no `torch.autograd.grad`
        torch.testing.assert_close(results(run, x, list(model.parameters())), theirs)
        assert len(calls) == 1
        return
    x = x.clone().requires_grad_()
    y = run(x)
    (y * draw(*y.shape, seed=3)).sum().backward()
    torch.testing.assert_close([x.grad, *[p.grad for p in model.parameters()]], list(theirs[1]))


def test_several_gradients_at_once():
    model, x = chain(2, 2, activation="silu", dtype=torch.float64), draw(2, 2, 3, 4, dtype=torch.float64)
    y, some = model(x), draw(3, 2, 2, 3, 4, dtype=torch.float64)
    batched, *each = [
        torch.autograd.grad(
            y, list(model.parameters()), grad, retain_graph=True, is_grads_batched=grad is some
        )
        for grad in (some, *some)
    ]
    torch.testing.assert_close(
        list(batched), [torch.stack(gradients) for gradients in zip(*each, strict=True)]
    )


def test_where_hooks_on_what_is_kept_are_forbidden(calls):
    model, x = chain(2, 4).double(), draw(2, 4, 6, 5, dtype=torch.float64)
    with torch.autograd.graph.disable_saved_tensors_hooks("forbidden"):
        assert_as_layers(model, x)
    assert calls


class TestWhatIsKept:
    def step(self, model, x):
        torch.autograd.grad(model(x).sum(), list(model.parameters()))

    @pytest.mark.parametrize(
        ("model", "size", "most"),
        [
            (chain(6, activation="relu"), 64, 0.75),
            (chain(6, activation="silu"), 64, 0.6),
            (chain(6, activation="hardswish"), 64, 0.6),
            (nn.Sequential(*[Bottleneck(32, 8) for _ in range(8)]), 32, 0.75),
            # The peak is in the gradient of a convolution of a concatenation, with oneDNN's scratch.
            (segfast.models.UNet(8, width=8, depth=3, norm="batch"), 64, 0.8),
        ],
        ids=["relu", "silu", "hardswish", "residual blocks", "U-Net"],
    )
    def test_a_step_takes_a_quarter_less_memory(self, model, size, most):
        channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        x, plain = draw(2, channels, size, size), Layers(copy.deepcopy(model))
        self.step(model, x)
        self.step(plain, x)
        kept = [bytes_held(lambda m=m: m(x).sum())[0][-1] for m in (model, plain)]
        assert kept[0] <= 0.75 * kept[1]
        peaks = [peak_bytes(lambda m=m: self.step(m, x), x.device) for m in (model, plain)]
        assert peaks[0] <= most * peaks[1]

    def test_nothing_is_kept_once_the_backward_pass_is_over(self):
        model, x = chain(3, 8), draw(2, 8, 32, 32)
        held, loss = bytes_held(lambda: self.all_but_the_graph(model, x))
        assert held[-1] < x.nbytes and loss.grad_fn is not None

    def test_nothing_is_kept_of_a_graph_that_is_dropped(self):
        """Where operators within keep their own results."""

        def dropped():
            x = draw(2, 8, 32, 32).requires_grad_()
            with keeping_less():
                x.sigmoid().exp()

        held, _ = bytes_held(dropped)
        assert held[-1] == 0

    def all_but_the_graph(self, model, x):
        loss = model(x).sum()
        loss.backward()
        model.zero_grad()
        return loss

    def test_a_result_is_made_again_where_it_is_asked_for_again(self):
        """By two layers, in two backward passes, and by one layer alone."""
        model, x = chain(1, 4).double(), draw(2, 4, 6, 5, dtype=torch.float64)
        heads = nn.ModuleList([ConvBNAct(4, 4).double() for _ in range(2)])

        def losses(run):
            z = run(model, x)
            return [(run(head, z) ** 2).sum() for head in heads]

        def gradients(run):
            first, second = losses(run)
            found = list(torch.autograd.grad(first, heads[0][0].weight, retain_graph=True))
            found += torch.autograd.grad(first, model[0][0].weight, retain_graph=True)
            return found + list(torch.autograd.grad(first + second, [model[0][0].weight, heads[1][0].weight]))

        torch.testing.assert_close(gradients(lambda m, x: m(x)), gradients(layer_by_layer))

    @pytest.mark.parametrize("change", ["write", "unseen by autograd", "move", "copy"])
    def test_a_result_that_was_changed_is_kept(self, change):
        model, x = chain(2, 4, activation="silu").double(), draw(2, 4, 6, 5, dtype=torch.float64)

        def gradients(run):
            z = run(model[0], x)
            if change == "write":
                z *= 2
            elif change == "unseen by autograd":
                with torch.no_grad():
                    z *= 2
            elif change == "move":
                z.data = 2 * z.detach()
            else:
                z = z.data.mul_(2) + 0 * z.sum()
            return torch.autograd.grad((run(model[1], z) ** 2).sum(), [block[0].weight for block in model])

        torch.testing.assert_close(gradients(lambda m, x: m(x)), gradients(layer_by_layer))

    @pytest.mark.parametrize("part", [lambda z: z[:, :2], lambda z: z[..., :4], lambda z: z.transpose(2, 3)])
    def test_a_part_of_a_result_is_not_taken_for_it(self, part):
        """It lies at the same place."""
        first, x = ConvBNAct(4, 4).double(), draw(2, 4, 5, 5, dtype=torch.float64)
        second = ConvBNAct(part(x).shape[1], 4).double()

        def gradients(run):
            z = run(first, x)
            return torch.autograd.grad((run(second, part(z)) ** 2).sum(), [first[0].weight, second[0].weight])

        torch.testing.assert_close(gradients(lambda m, x: m(x)), gradients(layer_by_layer))

    def test_a_sparse_tensor_is_kept_as_it_is(self):
        matrix, x = torch.eye(4).to_sparse(), draw(4, 4).requires_grad_()
        with keeping_less():
            (gradient,) = torch.autograd.grad(torch.sparse.mm(matrix, x).sum(), x)
        torch.testing.assert_close(gradient, torch.ones(4, 4))

    @pytest.mark.parametrize("what", ["conv", "norm"])
    def test_a_change_before_the_backward_pass_is_an_error(self, what):
        model, x = chain(2, 4), draw(2, 4, 6, 5)
        y = model(x)
        with torch.no_grad():
            (model[1][0] if what == "conv" else model[0][1]).weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def _rank(rank, port, results, momentum, images):
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model, x, grad = synchronized(momentum)
    own = slice(images) if rank == 0 else slice(images, None)
    results[rank] = after_a_step(nn.SyncBatchNorm.convert_sync_batchnorm(model), x[own], grad[own])
    torch.distributed.destroy_process_group()


def synchronized(momentum):
    """A model, a batch of 4 far from zero and the gradient of its output."""
    torch.manual_seed(0)
    model = chain(2, 3, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=momentum), activation="silu").double()
    return model, 100 + draw(4, 3, 5, 4, dtype=torch.float64), draw(4, 3, 5, 4, seed=5, dtype=torch.float64)


def after_a_step(model, x, grad):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad)
    gradients = [p.grad for p in model.parameters()]
    return [y.detach(), x.grad], gradients, [b.clone() for b in model.buffers()]


@pytest.mark.parametrize(("momentum", "images"), [(0.1, 3), (None, 4)])
def test_two_ranks_share_their_statistics(momentum, images):
    """Of 4 images the first has so many, the second the others or none: as one process with all 4."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        shared = manager.dict()
        torch.multiprocessing.spawn(_rank, (port, shared, momentum, images), nprocs=2)
        ranks = [shared[0], shared[1]]
    model, x, grad = synchronized(momentum)
    of_images, gradients, buffers = after_a_step(model, x, grad)
    for index, expected in enumerate(of_images):
        torch.testing.assert_close(torch.cat([ranks[0][0][index], ranks[1][0][index]]), expected)
    summed = [a + b for a, b in zip(ranks[0][1], ranks[1][1], strict=True)]
    torch.testing.assert_close(summed, gradients, atol=1e-9, rtol=1e-9)
    for rank in ranks:
        torch.testing.assert_close(rank[2], buffers)


class Layers(nn.Module):
    """A model with its layers one by one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return layer_by_layer(self.model, x)
