"""What every network of `segfast.models` must do: subclass `ModelTester`, fill in its attributes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.models import SegmentationModel, create, list_models
from segfast.train import load_checkpoint, save_checkpoint


class ModelTester:
    name: str
    """As `segfast.models.create` knows it."""
    options: dict
    """Constructor arguments that make it small."""
    sizes = ((32, 48), (37, 50), (33, 35), (7, 7), (1, 3))
    """Input sizes whose output has the same size."""

    def build(self, **overrides) -> SegmentationModel:
        torch.manual_seed(0)
        return create(self.name, **{**self.options, **overrides})

    def batch(self, model, size=(33, 35), count=2):
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(count, model.in_channels, *size, generator=generator)
        return images, torch.randint(model.num_classes, (count, *size), generator=generator)

    def test_is_listed_and_rebuilt_from_its_config(self):
        model = self.build()
        assert self.name in list_models()
        twin = create(self.name, **model.config)
        assert {k: v.shape for k, v in twin.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }

    def test_output_has_the_size_of_the_input(self):
        model = self.build(in_channels=3, num_classes=5).eval()
        for size in self.sizes:
            assert model(torch.randn(2, 3, *size)).shape == (2, 5, *size)

    def test_empty_batch(self):
        model = self.build().eval()
        assert model(torch.randn(0, model.in_channels, 32, 32)).shape == (0, model.num_classes, 32, 32)

    def test_an_image_does_not_depend_on_its_batch(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        torch.testing.assert_close(model(images)[1:], model(images[1:]), rtol=1e-4, atol=1e-5)

    def test_training_lowers_the_loss_and_reaches_every_parameter(self):
        model = self.build().train()
        images, targets = self.batch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for _ in range(12):
            loss = F.cross_entropy(model(images), targets)
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
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, model(images), rtol=1e-4, atol=1e-5)

    def test_bfloat16_autocast(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        assert output.dtype is torch.bfloat16
        expected = model(images)
        assert (output - expected).abs().max() < 0.1 * expected.abs().max()

    def test_optimize_leaves_the_output(self):
        model = self.build().eval()
        images, _ = self.batch(model)
        torch.testing.assert_close(segfast.optimize(model)(images), model(images), rtol=1e-4, atol=1e-5)

    def test_compiles_into_one_graph_for_all_sizes(self):
        model = self.build().eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch.no_grad():
            for size in ((32, 48), (33, 35)):
                images, _ = self.batch(model, size)
                torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)

    def test_exports_with_dynamic_sizes(self):
        model = self.build().eval()
        free = torch.export.Dim.DYNAMIC
        images, _ = self.batch(model, (32, 48))
        program = torch.export.export(model, (images,), dynamic_shapes=({0: free, 2: free, 3: free},))
        for size in ((64, 40), (37, 51)):
            images, _ = self.batch(model, size, count=3)
            torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", [(1, 32, 32), (1, 1, 1, 32, 32)])
    def test_other_than_four_dimensions_is_an_error(self, shape):
        with pytest.raises(ValueError, match=r"\[N, 1, H, W\]"):
            self.build(in_channels=1)(torch.randn(shape))
