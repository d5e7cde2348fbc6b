"""The cases that proofs, compile report and benchmarks draw from: names, formulas, how strict proofs are."""

import subprocess
import sys

import pytest
import torch

from segfast.ops import FAMILIES
from segfast.ops._case import Case, cases, launches, proofs
from segfast.ops._convolution_case import ConvolutionCase
from segfast.ops._prove import error_and_allowance
from segfast.ops.conv2d.cases import Conv2d
from segfast.ops.conv_transpose2d.cases import ConvTranspose2d, UpConcat

CPU = torch.device("cpu")
USES = ("prove", "compile", "benchmark", "quick", "headline")


def test_importing_segfast_imports_no_cases():
    code = "import sys, segfast, segfast.nn, segfast.crf; print(*(m for m in sys.modules if 'segfast' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert "segfast.ops" in names and [name for name in names if name.endswith(("case", "cases"))] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_one_case(family):
    for use in USES:
        found = [case for case in cases(family, use) if case.name]
        assert len({case.name for case in found}) == len(found)
        assert all(case.family == family and set(case.uses) <= set(USES) for case in found)
    assert cases(family, "prove") and cases(family, "compile")
    names = [name for name, _, _ in launches(family, torch.float32)]
    assert len(set(names)) == len(names)
    # A layer is one of a model's.
    assert all(case.layer for case in cases(family, "benchmark"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_proof_passes_what_is_wrong_by_a_hundredth(family, dtype):
    rows = set()
    for item in proofs(family, CPU, dtype):
        assert (item.operation, item.case) not in rows
        rows.add((item.operation, item.case))
        assert item.reference.dtype == torch.float64 and item.aten.shape == item.reference.shape
        largest = item.reference.abs().max()
        error, allowed = error_and_allowance(item.aten, *item[3:])
        assert error <= allowed <= 2e-2 * largest, item.case
        assert 0 < item.magnitude.abs().max() < 1e4 * largest or largest == 0


def test_a_convolutions_magnitude_is_what_its_terms_add_up_to():
    """By hand: 2 x 2 pixels under a filter of ones and minus ones, with every step of the epilogue."""
    sizes = {"n": 1, "ci": 1, "co": 1, "h": 2, "w": 2, "k": 2, "s": 1, "p": 0, "d": 1}
    case = Conv2d("", "", sizes, epilogue=("bias", "affine", "add", "relu"))
    t = {
        "x": torch.tensor([[[[1.0, -2.0], [3.0, 4.0]]]]),
        "weight": torch.tensor([[[[1.0, 1.0], [-1.0, 1.0]]]]),
        "bias": torch.tensor([-3.0]),
        "scale": torch.tensor([2.0]),
        "shift": torch.tensor([-5.0]),
        "residual": torch.tensor([[[[-7.0]]]]),
    }
    assert case.linear().formula(t).item() == 2 * (1 - 2 - 3 + 4 - 3) - 5 - 7
    assert case.formula(t).item() == 0
    assert case.magnitude(t).item() == 2 * (1 + 2 + 3 + 4 + 3) + 5 + 7
    sums = {"x": t["x"], "weight": t["weight"], "grad": torch.ones(1, 1, 1, 1)}
    to_input, to_weight = case._gradients(sums)
    assert torch.equal(to_input, t["weight"]) and torch.equal(to_weight, t["x"])


def test_terms_of_a_sum():
    conv = Conv2d("", "", {"n": 3, "ci": 8, "co": 6, "h": 9, "w": 7, "k": 3, "s": 2, "p": 1, "d": 1, "g": 2})
    assert conv.output_size == (5, 4) and conv.depths() == (9 * 4, 9 * 3, 3 * 5 * 4)
    # Padded so that there are more outputs than inputs, none of whose taps meets more than the inputs.
    padded = conv.replace(params={**conv.params, "s": 1, "p": 20})
    assert padded.depths()[2] == 3 * 9 * 7
    up = conv.become(ConvTranspose2d, params={**conv.params, "s": 2, "extra": 1})
    assert up.output_size == (18, 14) and up.depths() == (4 * 4, 9 * 3, 3 * 9 * 7)
    cropped = up.become(UpConcat, params={**up.params, "p": 0, "extra": (0, 1)})
    assert cropped.output_size == (19, 16)


def test_a_case_becomes_another_operations():
    conv = Conv2d("name", "layer", {"k": 3}, {"n": 1}, ("relu",), dtype="float32", direction="train")
    other = conv.become(ConvTranspose2d, name="other")
    assert isinstance(other, ConvTranspose2d) and isinstance(other, ConvolutionCase)
    assert (other.name, other.layer, other.params, other.direction) == ("other", "layer", {"k": 3}, "train")
    assert isinstance(conv.replace(size="cpu"), Conv2d) and issubclass(Conv2d, Case)
