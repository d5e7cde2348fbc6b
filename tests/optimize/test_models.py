"""`segfast.optimize` on torchvision's and smp's segmentation networks: same outputs, and as the docs say."""

import copy

import pytest
import torch

import segfast
from tests.optimize.coverage import HAS_SMP, MODELS, PAGE, SMPS, build, example, optimized, page, row

pytestmark = pytest.mark.usefixtures("fused_at_any_size")

NEEDS_SMP = pytest.mark.skipif(not HAS_SMP, reason="segmentation-models-pytorch is not installed")
EACH = [pytest.param(name, marks=NEEDS_SMP) if name in SMPS else name for name in MODELS]


def outputs(model, image):
    with torch.no_grad():
        found = model(image)
    return dict(found) if isinstance(found, dict) else {"out": found}


@pytest.mark.parametrize("name", EACH)
def test_same_outputs(name):
    model, fast = optimized(name)
    image = example(name)
    for pixels in (image, image.contiguous(memory_format=torch.channels_last)):
        expected, actual = outputs(model, pixels), outputs(fast, pixels)
        assert actual.keys() == expected.keys()
        for key, scores in expected.items():
            assert scores.std() > 1e-3
            torch.testing.assert_close(actual[key], scores, rtol=1e-4, atol=1e-4 * scores.abs().max().item())


@pytest.mark.parametrize("name", EACH)
def test_no_batch_norm_runs_by_itself(name, monkeypatch):
    ran = []
    batch_norm = torch.nn.functional.batch_norm
    monkeypatch.setattr(
        torch.nn.functional, "batch_norm", lambda *args, **kw: ran.append(args) or batch_norm(*args, **kw)
    )
    model, fast = optimized(name)
    outputs(fast, example(name))
    assert not ran
    outputs(model, example(name))
    assert len(ran) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", EACH[:1] + EACH[-1:])
def test_restoring_brings_back_the_very_outputs(name):
    model, fast = optimized(name)
    again = segfast.restore(copy.deepcopy(fast))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(outputs(again, example(name)), outputs(model, example(name)), rtol=0, atol=0)


@pytest.mark.parametrize("name", EACH)
def test_the_page_is_up_to_date(name):
    assert row(name) in PAGE.read_text().splitlines()


@NEEDS_SMP
def test_nothing_else_is_on_the_page():
    assert PAGE.read_text() == page()


@NEEDS_SMP
def test_without_an_example_whole_aspps_are_fused_too():
    model = build("DeepLabV3")
    assert "decoder.aspp" in segfast.report(segfast.optimize(model)).fused
