"""Results on CPU tensors do not depend on torch's default dtype or device: a sample of every family.

Sizes and weights are made before the default changes; only the calls are made under it.
"""

import contextlib
import copy
import functools
import sys

import numpy as np
import pytest
import torch
from torch import nn

import segfast
import segfast.crf
from segfast import functional, models
from segfast.data import Sample, astronaut, normalize, nuclei
from segfast.train import Options, PatchSampler, evaluate, fit, predict_scores
from tests.operators import over_samples


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


def draw(*shape, seed=0, grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def labels(*shape, classes):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def with_gradients(function, *leaves):
    """The result of `function()` and its gradients in `leaves`, for an incoming gradient of ones."""
    result = function()
    return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]


def conv2d():
    x, weight, bias = draw(2, 4, 9, 8, grad=True), draw(6, 4, 3, 3, seed=1, grad=True), draw(6, seed=2)
    scale, shift = draw(6, seed=3), draw(6, seed=4)
    call = functools.partial(functional.conv2d, x, weight, bias, padding=2, dilation=2)
    yield lambda: with_gradients(lambda: call(scale=scale, shift=shift, activation="relu"), x, weight)


def conv_transpose2d():
    x, weight, skip = draw(1, 4, 5, 4, grad=True), draw(4, 3, 2, 2, seed=1, grad=True), draw(1, 2, 10, 8)
    yield lambda: with_gradients(lambda: functional.conv_transpose2d(x, weight, stride=2), x, weight)
    yield lambda: with_gradients(lambda: functional.up_concat(x, skip, weight, stride=2), x, weight)
    bilinear = segfast.nn.init.bilinear_(torch.empty(4, 4, 4, 4))
    yield lambda: functional.conv_transpose2d(x.detach(), bilinear, stride=2, padding=1)
    yield lambda: segfast.nn.init.bilinear_(torch.empty(4, 4, 4, 4, device="cpu", dtype=torch.float32))


def separable_conv2d():
    x, weight, pointwise = draw(2, 4, 9, 8, grad=True), draw(4, 1, 3, 3, seed=1), draw(5, 4, 1, 1, seed=2)
    weight.requires_grad_()
    yield lambda: with_gradients(lambda: functional.depthwise_conv2d(x, weight, padding=1), x, weight)
    yield lambda: with_gradients(
        lambda: functional.separable_conv2d(x, weight, pointwise, padding=1, depthwise_activation="relu"), x
    )


def packed_pool2d():
    x, y = draw(2, 5, 7, 6, grad=True), draw(2, 5, 4, 3, seed=1, grad=True)
    places = functional.packed_max_pool2d(x.detach(), ceil_mode=True)[1]
    yield lambda: functional.packed_max_pool2d(x.detach())
    yield lambda: with_gradients(lambda: functional.packed_max_pool2d(x, ceil_mode=True)[0], x)
    yield lambda: with_gradients(lambda: functional.packed_max_unpool2d(y, places, (7, 6)), y)


def segmentation_head():
    logits, target = draw(2, 5, 4, 3, grad=True), labels(2, 13, 7, classes=5)
    for mode, corners in (("bilinear", False), ("bilinear", True), ("nearest", None)):
        given = {"mode": mode, "align_corners": corners}
        yield lambda given=given: with_gradients(
            lambda: functional.upsample_cross_entropy(logits, target, label_smoothing=0.1, **given), logits
        )
        yield lambda given=given: functional.upsample_argmax(logits.detach(), (13, 7), **given)
    yield lambda: functional.upsample_argmax(logits.detach(), (8, 6), mode="nearest", return_confidence=True)
    yield lambda: with_gradients(lambda: functional.upsample_dice(logits, target), logits)


def dense_crf():
    unary, image = draw(1, 3, 9, 10, grad=True), 255 * draw(1, 3, 9, 10, seed=1).sigmoid()
    features = draw(1, 5, 9, 10, seed=2)
    for method in ("lattice", "exact", "auto"):
        yield lambda method=method: functional.gaussian_filter(unary.detach(), features, method=method)
        yield lambda method=method: functional.mean_field(unary.detach(), image, iterations=2, method=method)
        yield lambda method=method: with_gradients(
            lambda: functional.mean_field(unary, image, iterations=2, method=method), unary
        )
    yield lambda: functional.skipped_share(features)


def dense_crf_kernels():
    """Once a form: the interpreter takes seconds a call."""
    unary, image = draw(1, 3, 4, 5), 255 * draw(1, 3, 4, 5, seed=1).sigmoid()
    for method in ("lattice", "exact"):
        yield lambda method=method: functional.mean_field(unary, image, iterations=1, method=method)


def pydensecrf():
    rng = np.random.default_rng(0)
    unary, image = rng.random((3, 90), np.float32), rng.integers(0, 256, (9, 10, 3)).astype(np.uint8)
    features = rng.random((2, 90)).astype(np.float32)

    def run(method, given=True):
        crf = segfast.crf.DenseCRF2D(10, 9, 3, method=method)
        if given:
            crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(3, 3)
        crf.addPairwiseBilateral(60, 10, image, np.eye(3) - 1)
        crf.addPairwiseEnergy(features, 2)
        q, one, two = crf.startInference()
        crf.stepInference(q, one, two)
        found = (q, crf.inference(2), crf.map(1), crf.klDivergence(q))
        return [torch.from_numpy(np.array(result)) for result in found]

    for method in ("lattice", "exact"):
        yield functools.partial(run, method)
    yield functools.partial(run, "lattice", False)


def modules():
    torch.manual_seed(0)
    x = draw(2, 4, 8, 8)
    layers = [
        segfast.nn.Conv2d(4, 3, 3),
        segfast.nn.ConvBNAct(4, 3, 3),
        segfast.nn.ConvTranspose2d(4, 3, 2, stride=2),
        segfast.nn.DepthwiseConv2d(4, 4, 3),
        segfast.nn.SeparableConv2d(4, 6, padding=1, norm_layer=nn.BatchNorm2d),
        segfast.nn.InvertedResidual(4, 4),
        segfast.nn.ASPP(4, (1, 2), 3),
        segfast.nn.BilinearUpsample(4, 2),
        segfast.nn.UpsampleConv2d(4, 3),
        segfast.nn.UpsampleArgmax((16, 16)),
    ]
    for layer in layers:
        for mode in (True, False):
            yield lambda layer=layer, mode=mode: copy.deepcopy(layer).train(mode)(x)
    loss, target = segfast.nn.UpsampleCrossEntropyLoss(), labels(2, 16, 16, classes=4)
    yield lambda: loss(x, target)
    crf, image = segfast.nn.DenseCRF(4, learn_thetas=True), 255 * draw(2, 3, 8, 8, seed=1).sigmoid()
    yield lambda: crf(x, image)


def networks():
    torch.manual_seed(0)
    small = [
        models.UNet(width=4, depth=2),
        models.create("deeplabv3plus_mobilenet_v2", num_classes=3),
        models.SelfieSegmenter(),
    ]
    for network in small:
        x = draw(1, 1 if isinstance(network, models.UNet) else 3, 32, 32)
        yield lambda network=network, x=x: network.eval()(x)
        yield lambda network=network, x=x: segfast.optimize(copy.deepcopy(network), x)(x)


def training():
    torch.manual_seed(0)
    image, target = nuclei()
    sample = Sample(image[:, :48, :40], (target[:48, :40] > 0).long())
    network = models.UNet(width=4, depth=2)
    unpadded = models.UNet(width=4, depth=2, padded=False)
    yield lambda: list(PatchSampler([sample], size=32, batch_size=2)())

    def trained():
        own = copy.deepcopy(network)
        losses = fit(
            own, PatchSampler([sample], size=32, batch_size=2), Options(steps=2, class_weights=(1.0, 2.0))
        )
        return [torch.tensor(losses, dtype=torch.float64, device="cpu"), *own.state_dict().values()]

    yield trained
    yield lambda: evaluate(network, [sample], 2).iou
    yield lambda: predict_scores(network, sample.image, tile=16)
    yield lambda: predict_scores(unpadded, sample.image)
    yield lambda: [astronaut(), *nuclei(), normalize(sample.image.numpy())]


def results(call):
    """The tensors of a call in which nothing is remembered from the calls before it."""
    for name in [name for name in sys.modules if name.startswith("segfast")]:
        for thing in vars(sys.modules[name]).values():
            if isinstance(thing, functools._lru_cache_wrapper):
                thing.cache_clear()
    found = call()
    found = found.values() if isinstance(found, dict) else [found] if torch.is_tensor(found) else found
    return [t.detach() for t in found]


def check(family, setting):
    if family is pydensecrf and setting == "meta":
        pytest.skip("segfast.crf computes on the default device on purpose")
    for number, call in enumerate(family()):
        torch.manual_seed(0)
        with SETTINGS[setting]():
            found = results(call)
        torch.manual_seed(0)
        for actual, expected in zip(found, results(call), strict=True):
            assert actual.device.type == "cpu", number
            assert actual.dtype == expected.dtype and torch.equal(actual, expected), number


@pytest.mark.parametrize("setting", SETTINGS)
@over_samples(globals(), pydensecrf, modules, networks, training)
def test_a_default_changes_no_result(family, setting):
    check(family, setting)


@pytest.mark.interpreter
@pytest.mark.parametrize("setting", SETTINGS)
@over_samples(globals() | {"dense_crf": dense_crf_kernels})
def test_a_default_changes_no_kernels_result(family, setting):
    with segfast.backend("triton"):
        check(family, setting)
