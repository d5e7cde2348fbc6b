"""Duties of every network of `segfast.models`: subclass `ModelTester`, fill in its attributes."""

import copy
import pickle
import sys
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch import nn

import segfast
from segfast.models import SegmentationModel, create, list_models, model_name, remap_state_dict
from segfast.models._base import main_scores
from segfast.train import class_loss, load_checkpoint, predict, save_checkpoint


def each_scores(output) -> dict[str, torch.Tensor]:
    """The class scores of a network's output by name, whichever form it has."""
    return {"out": output} if isinstance(output, torch.Tensor) else dict(output)


class ModelTester:
    name: str
    """As `segfast.models.create` knows it."""
    options: dict
    """Constructor arguments that make it small."""
    parameters: int
    """Of the network in full size: what the paper, or the code that published its weights, counts."""
    full: ClassVar[dict] = {}
    """Constructor arguments of that."""
    paper: str
    """Its authors, as the network's documentation names them."""
    scores: ClassVar[set[str]] = {"out"}
    """The names of what it returns, if that is a dictionary."""
    sizes = ((32, 48), (37, 50), (33, 35), (7, 7), (1, 3))
    """Input sizes whose output has the same size."""
    lr = 0.01
    """A learning rate with which it trains from the first step on."""
    dynamic = True
    """Whether it is compiled once for all sizes, or, where that takes torch too long, for one."""
    example = (48, 64)
    """An input size with more than one pixel at every layer, for which the network is exported."""
    ranged = True
    """Whether it exports for a range of sizes with no guard within, or, where an operator of torch's own sets
    some, for those that keep them."""

    def build(self, **overrides) -> SegmentationModel:
        torch.manual_seed(0)
        return create(self.name, **{**self.options, **overrides})

    def batch(self, model, size=(33, 35), count=2):
        """Images of noise, and classes in blocks that coarse scores can follow too."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(count, model.in_channels, *size, generator=generator)
        blocks = [-(-n // 16) for n in size]
        targets = torch.randint(model.num_classes, (count, *blocks), generator=generator)
        return images, targets.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : size[0], : size[1]]

    def test_is_listed_and_rebuilt_from_its_config(self):
        model = self.build()
        assert self.name in list_models()
        assert model_name(model) == self.name
        twin = create(self.name, **model.config)
        assert {k: v.shape for k, v in twin.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }

    def test_parameter_count(self):
        with torch.device("meta"):
            model = create(self.name, **self.full)
        assert sum(parameter.numel() for parameter in model.parameters()) == self.parameters

    def test_documentation_names_the_paper(self):
        module = sys.modules[type(self.build()).__module__]
        assert self.paper in module.__doc__ + type(self.build()).__doc__

    def test_output_has_the_size_of_the_input(self):
        model = self.build(in_channels=3, num_classes=5).eval()
        for size in self.sizes:
            found = each_scores(model(torch.randn(2, 3, *size)))
            assert {name: scores.shape for name, scores in found.items()} == {
                name: (2, 5, *size) for name in self.scores
            }

    def test_empty_batch(self):
        model = self.build().eval()
        for scores in each_scores(model(torch.randn(0, model.in_channels, 32, 32))).values():
            assert scores.shape == (0, model.num_classes, 32, 32)

    def test_an_image_does_not_depend_on_its_batch(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        second = {name: scores[1:] for name, scores in each_scores(model(images)).items()}
        assert all(scores.std() > 1e-3 for scores in second.values()), "nothing to compare"
        torch.testing.assert_close(second, each_scores(model(images[1:])), rtol=1e-4, atol=1e-5)

    def test_predicts_the_largest_score(self):
        model = self.build().eval()
        images, _ = self.batch(model, count=1)
        assert torch.equal(predict(model, images[0]), main_scores(model(images))[0].argmax(0))

    def test_a_step_on_one_image_lowers_its_loss(self):
        model = self.build().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        images, targets = self.batch(model, count=1)
        before = class_loss(model(images), targets)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(before, parameters)
        # So far down the gradient that a plane would fall by a hundredth.
        step = 0.01 * before.item() / sum(grad.square().sum().item() for grad in grads)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= step * grad
        fallen = before.item() - class_loss(model(images), targets).item()
        assert 0.002 < fallen / before.item() < 0.02

    def test_training_lowers_the_loss_and_reaches_every_parameter(self):
        model = self.build().train()
        images, targets = self.batch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr)
        losses = []
        for _ in range(12):
            loss = class_loss(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0], losses
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

    def test_checkpoint_round_trip(self, tmp_path):
        model = self.build().eval()
        images, _ = self.batch(model)
        save_checkpoint(model, tmp_path / "model.safetensors")
        loaded = load_checkpoint(tmp_path / "model.safetensors")
        assert type(loaded) is type(model) and loaded.config == model.config
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)

    @pytest.mark.parametrize(
        "prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
    )
    @pytest.mark.parametrize("inside", [None, "state_dict", "model"])
    def test_own_weights_as_training_scripts_keep_them(self, prefix, inside):
        weights = self.build().state_dict()
        state = {prefix + name: value for name, value in weights.items()}
        if inside is not None:
            state = {"epoch": 3, inside: state, "optimizer": {"state": {}}, "best": torch.tensor(0.5)}
        found = remap_state_dict(state, self.build())
        assert found.keys() == weights.keys() and all(found[name] is weights[name] for name in weights)

    def test_what_is_no_checkpoint_of_it_is_named(self):
        model = self.build()
        for state, message in (
            (
                {"weights": {"a": torch.zeros(1)}, "epoch": 3},
                r"holds no tensors; it has 'weights' \(a dict\)",
            ),
            ({}, "holds no tensors; it has nothing"),
            ({"state_dict": {"up7.weight": torch.zeros(1)}}, r"up7\.weight"),
            ({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "has a twice"),
        ):
            with pytest.raises(ValueError, match=message):
                remap_state_dict(state, model)
        with pytest.raises(TypeError, match="mapping of names to tensors, got Linear"):
            remap_state_dict(nn.Linear(1, 1), model)

    def test_deepcopy_and_pickle(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(images), model(images), rtol=0, atol=0)

    def test_channels_last_gives_the_same(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
        output = twin(images.contiguous(memory_format=torch.channels_last))
        for scores in each_scores(output).values():
            assert scores.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, model(images), rtol=1e-4, atol=1e-5)

    def test_bfloat16_autocast(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        for name, expected in each_scores(model(images)).items():
            scores = each_scores(output)[name]
            assert scores.dtype is torch.bfloat16
            assert (scores - expected).abs().max() < 0.1 * expected.abs().max()

    def test_optimize_leaves_the_output(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        torch.testing.assert_close(segfast.optimize(model)(images), model(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.compat
    def test_compiles_into_one_graph(self):
        model = self.build().eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=self.dynamic)
        with torch.no_grad():
            for size in (self.example, (33, 35)) if self.dynamic else (self.example,):
                images, _ = self.batch(model, size)
                torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.compat
    def test_exports_with_dynamic_sizes(self):
        model = self.build().eval()
        images, _ = self.batch(model, self.example)
        if torch.__version__.startswith("2.11."):
            with mock.patch.object(torch, "max_pool2d", wraps=torch.max_pool2d) as pooling:
                model(images)
            if pooling.called:
                pytest.skip("torch 2.11 itself exports no max_pool2d with free sizes")
        dim = torch.export.Dim
        free = [dim(name, min=33, max=512) if self.ranged else dim.DYNAMIC for name in ("height", "width")]
        sizes = {0: dim.DYNAMIC, 2: free[0], 3: free[1]}
        program = torch.export.export(model, (images,), dynamic_shapes=(sizes,)).module()
        for size in ((64, 40), (37, 51), (48, 33)):
            images, _ = self.batch(model, size, count=3)
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", [(1, 32, 32), (1, 1, 1, 32, 32)])
    def test_other_than_four_dimensions_is_an_error(self, shape):
        with pytest.raises(ValueError, match=r"\[N, 1, H, W\]"):
            self.build(in_channels=1)(torch.randn(shape))
