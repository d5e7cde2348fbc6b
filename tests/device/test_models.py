"""Whole networks on a device: optimized, and a training step; with every kernel by name, and under "auto"."""

import pytest
import torch

import segfast
from segfast import models
from segfast.ops import _backend, _gpu, _proofs
from segfast.ops._choice import Choice, Choices

pytestmark = pytest.mark.device


def unet():
    return models.UNet(3, 4, width=8, depth=1), torch.randn(1, 3, 18, 13)


def deeplabv3plus():
    model = models.deeplabv3plus_mobilenet_v2(4, width_mult=0.25, decoder_channels=16, dropout=0.0)
    return model, torch.randn(2, 3, 33, 33)


class Refined(torch.nn.Module):
    """A classifier of pixels, and a CRF as a layer on top."""

    def __init__(self):
        super().__init__()
        self.classify = segfast.nn.Conv2d(3, 4, 3, padding=1)
        self.crf = segfast.nn.DenseCRF(4, iterations=2, eval_iterations=2, theta_alpha=6.0, theta_beta=30.0)

    def forward(self, image):
        return self.crf(self.classify(image / 255), image)


def crf_as_rnn():
    return Refined(), 255 * torch.rand(1, 3, 9, 11)


SHALLOW = {"U-Net": unet, "CRF as RNN": crf_as_rnn}
NETWORKS = SHALLOW | {"DeepLabV3+": deeplabv3plus}


@pytest.fixture(params=["triton", "auto"], autouse=True)
def backend(request, monkeypatch):
    """ "auto" with every kernel proven and chosen for every call."""
    ours = Choice("triton", {})
    monkeypatch.setattr(_proofs, "proven", lambda operation, dtype, device: True)
    monkeypatch.setattr(_gpu, "_known", {_gpu.gpu_name(-1)})
    monkeypatch.setattr(Choices, "find", lambda choices, call: ours)
    with segfast.backend(request.param):
        yield request.param
    assert not _backend.FAILED  # no kernel has left its work to ATen


@pytest.fixture(autouse=True)
def exact_fp32():
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


def made(name):
    torch.manual_seed(0)
    model, image = NETWORKS[name]()
    return model, image


def close(actual, expected, share=1e-2):
    error = (actual.detach().cpu().double() - expected.double()).abs().amax()
    assert error <= share * expected.abs().amax() + 1e-5, f"{error:.3g}"


@pytest.mark.parametrize("name", NETWORKS)
def test_optimized(name, device):
    model, image = made(name)
    model.eval()
    with torch.no_grad(), segfast.backend("aten"):
        expected = model(image)
    model.to(device)
    fast = segfast.optimize(model, image.to(device))
    with torch.no_grad():
        close(fast(image.to(device)), expected, 2e-3 if name in SHALLOW else 2e-2)
    explanations = segfast.explain(fast, image.to(device))
    assert any(explanation.backend == "triton" for explanation in explanations), explanations


@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(name, device):
    model, image = made(name)
    target = torch.randint(4, (image.shape[0], *image.shape[2:]))
    model.train()
    if name in SHALLOW:
        with segfast.backend("aten"):
            expected = torch.nn.functional.cross_entropy(model(image), target)
            expected.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
        model.zero_grad()
    model.to(device)
    loss = torch.nn.functional.cross_entropy(model(image.to(device)), target.to(device))
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        if name in SHALLOW:
            # Small gradients are differences of large ones: judged by the largest of all.
            largest = max(g.abs().amax() for g in gradients.values())
            assert (parameter.grad.cpu() - gradients[key]).abs().amax() <= 1e-2 * largest, key
    assert loss.isfinite()
    if name in SHALLOW:
        close(loss, expected.detach())
