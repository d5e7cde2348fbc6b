"""gaussian_filter and mean_field as operators: what compilers, exporters, transforms and tensor modes see."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.functional import gaussian_filter, mean_field
from tests.fused_conv import draw

METHODS = ("lattice", "exact")
SIZE = (5, 6)


def crf_inputs(batch=2, labels=3, size=SIZE, learns=True, seed=0):
    """Everything that mean_field differentiates, by its name."""
    tensors = {
        "unary": draw(batch, labels, *size, seed=seed),
        "image": 40 * draw(batch, 2, *size, seed=seed + 1),
        "theta_alpha": torch.tensor([3.0, 4.5]),
        "theta_beta": torch.tensor([30.0, 50.0]),
        "theta_gamma": torch.tensor(1.6),
        "bilateral_weight": draw(labels, labels, seed=seed + 2),
        "spatial_weight": draw(labels, seed=seed + 3),
        "compatibility": draw(labels, labels, seed=seed + 4),
    }
    return {name: t.detach().requires_grad_(learns) for name, t in tensors.items()}


def refine(method="lattice", **tensors):
    return mean_field(**tensors, iterations=2, method=method)


@pytest.mark.compat
@pytest.mark.parametrize(
    "learn_thetas, dtype", [(False, torch.float32), (True, torch.float32), (False, torch.uint8)]
)
def test_the_layer_exports_with_dynamic_sizes(learn_thetas, dtype):
    crf = segfast.nn.DenseCRF(3, learn_thetas=learn_thetas).eval()
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    sizes = {0: batch, 2: height, 3: width}
    inputs = draw(2, 3, 5, 7), (255 * torch.rand(2, 3, 5, 7)).to(dtype)
    with torch.no_grad():
        program = torch.export.export(crf, inputs, dynamic_shapes=(sizes, sizes))
        assert sum(str(n.target) == "segfast.mean_field.default" for n in program.graph.nodes) == 1
        for size in ((5, 7), (6, 9)):
            inputs = draw(3, 3, *size), (255 * torch.rand(3, 3, *size)).to(dtype)
            torch.testing.assert_close(program.module()(*inputs), crf(*inputs))


@pytest.mark.parametrize("method", METHODS)
def test_all_pairs_decompose_and_a_lattice_stays_whole(method):
    crf, inputs = segfast.nn.DenseCRF(3, method=method).eval(), (draw(2, 3, *SIZE), 9 * draw(2, 3, *SIZE))
    with torch.no_grad():
        program = torch.export.export(crf, inputs).run_decompositions(segfast.decompositions())
        whole = [n for n in program.graph.nodes if "segfast" in str(n.target)]
        assert len(whole) == (method == "lattice")
        torch.testing.assert_close(program.module()(*inputs), crf(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_jacobians(method):
    values, features = draw(3, 2, 20), draw(3, 4, 20, seed=1)

    def loss(values):
        return (
            gaussian_filter(values, features, method=method, normalization="symmetric").square().sum((1, 2))
        )

    expected = torch.autograd.functional.jacobian(loss, values)
    torch.testing.assert_close(jacrev(loss)(values), expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_each_image_by_itself(method):
    crf = segfast.nn.DenseCRF(3, 2, method=method, learn_thetas=True, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in crf.named_parameters()}
    logits, image = draw(2, 3, *SIZE).double(), 40 * draw(2, 3, *SIZE, seed=1)

    def loss(parameters, logits, image):
        return functional_call(crf, parameters, (logits[None], image[None]))[:, 0].sum()

    actual = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, logits, image)
    for i in range(2):
        crf.zero_grad()
        crf(logits[i : i + 1], image[i : i + 1])[:, 0].sum().backward()
        for name, parameter in crf.named_parameters():
            torch.testing.assert_close(actual[name][i], parameter.grad)


def test_second_gradients_of_the_operators_are_an_error():
    tensors = crf_inputs()

    def loss(unary):
        return refine(**{**tensors, "unary": unary}).square().sum()

    with pytest.raises(
        NotImplementedError, match="mean_field has gradients of gradients in eager calls only"
    ):
        grad(lambda unary: grad(loss)(unary).square().sum())(tensors["unary"].detach())


def test_flops():
    tensors = crf_inputs(learns=False)
    with FlopCounterMode(display=False) as counter:
        mean_field(tensors["unary"], method="lattice", iterations=2)
    # Splat and slice of two features, three labels; then what each pays.
    assert counter.get_total_flops() == 2 * 2 * (30 * 4 * 3 * 3 + 2 * 30 * 3)
    with FlopCounterMode(display=False) as counter:
        refine("exact", **tensors)
    pixels = 30
    filters = pixels**2 * (2 * 3 + 2 * 4 + 4) + 2 * 3 * pixels * sum(SIZE)
    mixing = 2 * 2 * pixels * (3 * 3 + 3 * 3)
    composing = 2 * 3**3
    assert counter.get_total_flops() == 2 * (2 * filters + mixing) + composing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_full_precision(dtype):
    tensors = crf_inputs(learns=False)
    tensors["unary"] = tensors["unary"].to(dtype)
    values, features = draw(1, 3, 40), draw(1, 2, 40, seed=1)
    expected = refine(**tensors), gaussian_filter(values, features, method="exact")
    with torch.autocast("cpu", torch.bfloat16):
        actual = refine(**tensors), gaussian_filter(values, features, method="exact")
        if dtype == torch.float32:
            compiled = torch.compile(refine, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(**tensors), expected[0], atol=1e-6, rtol=1e-6)
    assert actual[0].dtype == dtype
    assert all(map(torch.equal, actual, expected))


def test_the_operators_check_values_too():
    """Behind a compiler, where the functions cannot."""
    torch._dynamo.reset()
    compiled = torch.compile(refine, backend="aot_eager", fullgraph=True)
    for name, message in (
        ("unary", "unary holds NaN"),
        ("image", "image must be finite"),
        ("theta_gamma", "theta_gamma must be positive and finite"),
    ):
        tensors = crf_inputs(learns=False)
        tensors[name] = tensors[name] * float("nan")
        with pytest.raises(ValueError, match=message):
            compiled(**tensors)
