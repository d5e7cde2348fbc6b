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
    # Labels that follow the image: the color term pays off.
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


def test_normalization_is_mean_field_s_and_the_impossible_stays_finite(example):
    logits, image = example
    for normalization in ("before", "after"):
        crf = segfast.nn.DenseCRF(4, 2, 2, normalization=normalization)
        options = {"theta_alpha": 160, "theta_beta": 3, "bilateral_weight": 5.0, "spatial_weight": 3.0}
        expected = mean_field(-logits, image, iterations=2, normalization=normalization, **options).log()
        torch.testing.assert_close(crf(logits, image), expected, rtol=1e-4, atol=1e-4)
    logits[:, 0] += 1e4
    assert segfast.nn.DenseCRF(4)(logits, image).isfinite().all()


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


def test_it_learns_thetas(example):
    """From colors too coarse for it, the layer finds those that tell the labels apart."""
    logits, image = example
    target = (image.mean(1) > 128).long()
    crf = segfast.nn.DenseCRF(4, 2, theta_beta=300, learn_thetas=True)
    others = {"bilateral_weight", "spatial_weight", "compatibility"}
    thetas = {name: p.detach().clone() for name, p in crf.named_parameters() if name not in others}
    assert {name: theta.tolist() for name, theta in thetas.items()} == {
        "theta_alpha": [160.0, 160.0],
        "theta_beta": [300.0, 300.0, 300.0],
        "theta_gamma": [3.0, 3.0],
    }
    optimizer = torch.optim.Adam([getattr(crf, name) for name in thetas], lr=5.0)
    crf.theta_gamma.requires_grad_(False)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(crf(logits, image), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all((crf.theta_beta - thetas["theta_beta"]).abs() > 1)
    assert torch.equal(crf.theta_gamma, thetas["theta_gamma"])


def test_learned_thetas_are_state_and_the_same_as_numbers(example):
    options = {"theta_alpha": (20, 30), "theta_beta": [50, 60, 70], "theta_gamma": 2.0}
    crf = segfast.nn.DenseCRF(4, learn_thetas=True, **options).eval()
    plain = segfast.nn.DenseCRF(4, **options).eval()
    torch.testing.assert_close(crf(*example), plain(*example))
    names = ["bilateral_weight", "spatial_weight", "compatibility"]
    assert list(plain.state_dict()) == names
    assert list(crf.state_dict()) == [*names, "theta_alpha", "theta_beta", "theta_gamma"]
    assert [p.shape[0] for p in crf.parameters()][3:] == [2, 3, 2]
    with torch.no_grad():
        crf.theta_beta.mul_(2)
    other = segfast.nn.DenseCRF(4, learn_thetas=True, theta_alpha=9).eval()
    other.load_state_dict(crf.state_dict())
    expected = crf(*example)
    parameters = dict(crf.named_parameters())
    for same in (other, copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert torch.equal(same(*example), expected)
    assert torch.equal(torch.func.functional_call(plain, {}, example), plain(*example))
    fresh = segfast.nn.DenseCRF(4, learn_thetas=True, device="meta", dtype=torch.float64).eval()
    assert fresh.theta_beta.dtype == torch.float64 and fresh.theta_beta.is_meta
    torch.testing.assert_close(torch.func.functional_call(fresh, parameters, example), expected)
    crf.reset_parameters()
    torch.testing.assert_close(crf(*example), plain(*example))
    broken = copy.deepcopy(crf)
    for name in ("theta_alpha", "theta_beta", "theta_gamma"):
        parameter = getattr(broken, name)
        with torch.no_grad():
            parameter[0] = -1
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, got "):
            broken(*example)
        with torch.no_grad():
            parameter[0] = 1


def test_gradients_to_logits_and_image(example):
    logits, image = (t.requires_grad_() for t in example)
    segfast.nn.DenseCRF(4, 2)(logits, image)[:, 0].sum().backward()
    for tensor in (logits, image):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0


def test_repr_says_what_auto_chose(example):
    crf = segfast.nn.DenseCRF(2)
    assert repr(crf).endswith("method='auto')")
    small, large = ((torch.zeros(1, 2, n, n), torch.rand(1, 3, n, n)) for n in (8, 40))
    with torch.no_grad():
        crf(*small)
        assert repr(crf).endswith("theta_gamma=3.0, method='auto' (exact, exact))")
        crf.train()(*large)
    assert repr(crf).endswith("method='auto' (lattice, exact))")
    assert repr(pickle.loads(pickle.dumps(crf))) == repr(crf)
    exact = segfast.nn.DenseCRF(2, method="exact", learn_thetas=True)
    exact(*small)
    assert repr(exact).endswith("eval_iterations=10, learn_thetas=True, method='exact')")


def test_auto_is_asked_with_the_thetas_that_are_numbers(example, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "segfast.nn.dense_crf.chosen_methods", lambda *args: asked.append(args[1:]) or ("exact", "exact")
    )
    for learn_thetas in (False, True):
        segfast.nn.DenseCRF(4, theta_alpha=(80.0, 90.0), learn_thetas=learn_thetas)(*example)
    assert asked == [(3, ((80.0, 90.0), (3.0, 3.0, 3.0))), (3, None)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(example, dtype):
    logits, image = example[0].to(dtype), example[1]
    crf = segfast.nn.DenseCRF(4).eval()
    refined = crf(logits, image)
    assert refined.dtype == dtype and torch.equal(refined, crf(logits.float(), image).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crf(logits, image), refined)
    # What these weights are in 16 bits is the same number.
    assert torch.equal(copy.deepcopy(crf).to(dtype)(logits, image), refined)


def test_mistakes_are_mean_field_s(example):
    logits, image = example
    with pytest.raises(ValueError, match=r"compatibility must be a number, \[4\] or \[4, 4\]"):
        segfast.nn.DenseCRF(5)(logits, image)
    with pytest.raises(ValueError, match="image must be"):
        segfast.nn.DenseCRF(4)(logits, image[..., 1:])
    with pytest.raises(ValueError, match=r"theta_beta must be a number, \[\] or \[1\] on cpu, got \[3\]"):
        segfast.nn.DenseCRF(4, learn_thetas=True)(logits, image[:, :1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, "iterations must be an int of at least 0, got -1"),
        ({"eval_iterations": 2.5}, "iterations must be an int of at least 0, got 2.5"),
        ({"theta_alpha": 0.0}, "theta_alpha must be one positive number or 2 of them, got 0.0"),
        ({"theta_beta": (1, 2, -3), "learn_thetas": True}, "theta_beta must be .* 3 of them, got"),
        ({"theta_gamma": (1, 2, 3)}, "theta_gamma must be one positive number or 2 of them"),
        ({"method": "fast"}, "method must be one of"),
        ({"normalization": "both"}, "normalization must be one of"),
        ({"tolerance": 2}, "tolerance must be a number of at least 0 and less than 1, got 2"),
    ],
)
def test_mistakes_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        segfast.nn.DenseCRF(4, **options)
