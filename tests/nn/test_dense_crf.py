"""CRF-as-RNN as a layer: what it computes, what it learns, what it keeps."""

import copy
import pickle

import pytest
import torch

import segfast
from segfast.functional import mean_field

SIZE = (9, 11)


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, *SIZE, generator=generator)
    return logits, torch.rand(2, 3, *SIZE, generator=generator) * 255


def test_it_starts_as_potts_with_other_iterations_in_evaluation(example):
    logits, image = example
    crf = segfast.nn.DenseCRF(4, 2, 6, theta_alpha=20, theta_beta=50, bilateral_weight=4, spatial_weight=2)
    options = {"theta_alpha": 20, "theta_beta": 50, "bilateral_weight": 4.0, "spatial_weight": 2.0}
    for training, iterations in ((True, 2), (False, 6)):
        expected = mean_field(-logits, image, iterations=iterations, **options).log()
        torch.testing.assert_close(crf.train(training)(logits, image), expected, rtol=1e-4, atol=1e-4)
    assert segfast.nn.DenseCRF(4, 3, None).eval_iterations == 3
    assert (crf.train()(logits, image) - crf.eval()(logits, image)).abs().max() > 1e-3


def test_it_learns(example):
    logits, image = example
    logits.requires_grad_()
    # Labels that follow the image: the colour term pays off.
    target = (image.mean(1) > 128).long()
    crf = segfast.nn.DenseCRF(4, 3)
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(crf(logits, image), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert logits.grad.isfinite().all() and logits.grad.abs().max() > 0
    changed = [parameter.grad.abs().max() for parameter in crf.parameters()]
    assert len(changed) == 3 and min(changed) > 0


def test_state_copies_and_repr(example):
    crf = segfast.nn.DenseCRF(4, method="exact").eval()
    with torch.no_grad():
        crf.compatibility.add_(torch.rand(4, 4))
    assert list(crf.state_dict()) == ["bilateral_weight", "spatial_weight", "compatibility"]
    other = segfast.nn.DenseCRF(4, method="exact").eval()
    other.load_state_dict(crf.state_dict())
    expected = crf(*example)
    for same in (other, copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert torch.equal(same(*example), expected)
    crf.reset_parameters()
    assert torch.equal(crf.compatibility, -torch.eye(4)) and not torch.equal(crf(*example), expected)
    assert "DenseCRF(4, iterations=5, eval_iterations=10, theta_alpha=160.0" in repr(crf)
    assert segfast.nn.DenseCRF(4, device="meta", dtype=torch.float64).compatibility.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(example, dtype):
    logits, image = example[0].to(dtype), example[1]
    crf = segfast.nn.DenseCRF(4).eval()
    refined = crf(logits, image)
    assert refined.dtype == dtype and torch.equal(refined, crf(logits.float(), image).to(dtype))


def test_mistakes_are_mean_field_s(example):
    logits, image = example
    with pytest.raises(ValueError, match=r"compatibility must be a number, \[4\] or \[4, 4\]"):
        segfast.nn.DenseCRF(5)(logits, image)
    with pytest.raises(ValueError, match="image must be"):
        segfast.nn.DenseCRF(4)(logits, image[..., 1:])
