"""Losses and labels of upsampled logits against PyTorch's separate functions."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import CASES, find
from segfast.functional import upsample_argmax, upsample_cross_entropy

FAMILY = [case for case in CASES if case.family == "segmentation_head"]


@pytest.mark.parametrize("case", FAMILY, ids=lambda case: case.name)
def test_head(compare, case):
    compare(case)


# Of one image: the sides of the logits.
SIDES = {"ade20k_upsample_os32": (16, 16), "cityscapes_upsample_n1": (64, 128)}


@pytest.mark.parametrize("task", ["loss", "argmax"])
@pytest.mark.parametrize("head", SIDES)
def test_one_image_on_a_cpu(compare, head, task):
    if compare.device.type != "cpu":
        pytest.skip("the tiles are the CPU's")
    case = find(f"{head}_{task}").cpu()
    height, width = SIDES[head] if compare.proper else (n // 4 for n in SIDES[head])
    case = case.replace(name=f"{case.name}_one_image", params={**case.params, "h": height, "w": width})
    size = height * case["scale"], width * case["scale"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, case["classes"], height, width, generator=generator, requires_grad=True)
    target = torch.randint(case["classes"], (1, *size), generator=generator)

    def upsampled():
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def labels(function):
        return function()

    if task == "loss":
        runs = {
            "segfast": lambda: torch.autograd.grad(upsample_cross_entropy(logits, target), logits)[0],
            "pair": lambda: torch.autograd.grad(F.cross_entropy(upsampled(), target), logits)[0],
        }
        torch.testing.assert_close(*(run() for run in runs.values()), rtol=1e-4, atol=1e-7)
    else:
        runs = {
            "segfast": lambda: labels(lambda: upsample_argmax(logits, size)),
            "pair": lambda: labels(lambda: upsampled().argmax(1)),
        }
        scores = upsampled().detach()
        chosen = scores.gather(1, runs["segfast"]()[:, None])
        torch.testing.assert_close(chosen, scores.amax(1, keepdim=True))
    compare.side_by_side(case, runs)
