"""Follows docs/adding-an-operator.md: its files, written into a copy of the tree, are a working family."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import upward_imports
from tests.test_source_rules import RULES

ROOT = Path(__file__).resolve().parent.parent
FILES = dict(
    re.findall(
        r"^`([\w/]+\.py)`\n\n```python\n(.*?)^```$",
        (ROOT / "docs" / "adding-an-operator.md").read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
)
# The lists the page says to extend, each by one import and one name.
LISTS = {
    "kernels/__init__.py": ("from .conv_transpose2d", "from .prelu import prelu_forward", "prelu_forward"),
    "segfast/functional.py": ("from .ops.conv_transpose2d", "from .ops.prelu import prelu", "prelu"),
    "segfast/nn/__init__.py": ("from .conv_transpose2d", "from .prelu import PReLU", "PReLU"),
    "segfast/ops/__init__.py": ("from . import conv_transpose2d", "from . import prelu", "prelu"),
}

CHECKS = """
import traceback
import torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
import segfast

torch.manual_seed(0)
x = torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
w = torch.tensor([0.5, -0.25, 2.0], requires_grad=True)

def registered():
    assert "prelu" in segfast.ops.FAMILIES and "prelu" in segfast.ops.OPERATORS
    from segfast.kernels import _tiles
    assert "prelu_forward" in _tiles.operations()

def dispatch():
    assert segfast.explain(segfast.functional.prelu, x, w)[0].backend == "aten"
    with segfast.backend("triton"):
        assert segfast.explain(segfast.functional.prelu, x, w)[0].backend == "triton"
        try:
            segfast.functional.prelu(x.double(), w.double())
        except NotImplementedError as error:
            assert "float64" in str(error)
        else:
            raise AssertionError("fp64 has no kernel")

def values():
    with segfast.backend("triton"):
        y = segfast.functional.prelu(x, w)
    assert torch.equal(y, F.prelu(x, w)) and y.is_contiguous(memory_format=torch.channels_last)

def autograd():
    seed = torch.randn(x.shape)
    expected = torch.autograd.grad(F.prelu(x, w), (x, w), seed)
    with segfast.backend("triton"):
        actual = torch.autograd.grad(segfast.functional.prelu(x, w), (x, w), seed)
        torch.testing.assert_close(actual, expected)
        per_sample = torch.func.vmap(torch.func.grad(lambda a: segfast.functional.prelu(a[None], w).sum()))(x)
    torch.testing.assert_close(per_sample, torch.autograd.grad(F.prelu(x, w).sum(), x)[0])

def opcheck():
    torch.library.opcheck(torch.ops.segfast.prelu.default, (x.detach(), w.detach()))

def compiled():
    model = segfast.nn.PReLU(3)
    with segfast.backend("triton"):
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
    torch.testing.assert_close(y, F.prelu(x, model.weight))
    assert model.weight.grad.shape == (3,)

def flops():
    with segfast.backend("triton"), FlopCounterMode(display=False) as counter:
        segfast.functional.prelu(x, w)
    assert counter.get_total_flops() == 2 * x.numel()

def optimize():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.PReLU(3), torch.nn.PReLU())
    fast = segfast.optimize(model)
    assert [type(layer) for layer in fast[1:]] == [segfast.nn.PReLU] * 2
    assert segfast.report(fast).replaced == ["1", "2"]
    with segfast.backend("triton"):
        torch.testing.assert_close(fast(x), model(x))
    assert type(segfast.restore(fast)[1]) is torch.nn.PReLU

def proofs():
    from segfast.ops._prove import prove
    rows = list(prove(x.device, (torch.float32, torch.float16), families=("prelu",)))
    assert len(rows) == 4 and {row.operation for row in rows} == set(segfast.ops.prelu.OPERATIONS)
    assert [str(row) for row in rows if not row.passed] == []

def benchmark():
    from benchmarks.cases import find
    from benchmarks.suite import candidates, make_trial, measure_trial
    trial = make_trial(find("enet_initial").cpu().replace(direction="train"), x.device)
    with segfast.backend("triton"):
        found = measure_trial(trial, candidates(trial), budget_s=0.0, min_rounds=1)
    assert {m.candidate for m in found if m.status == "ok"} == {"segfast", "aten_nchw", "aten_nhwc"}

def measured():
    from segfast.ops._gpu_call import GPU_OPERATIONS, Draw, GpuCall
    from segfast.ops._gpu_measure import _runner
    call = GpuCall("prelu", "", torch.float32, "", True, ((2, 3, 5, 4),), ((3,),), (), True)
    bound = GPU_OPERATIONS["prelu"].bind(call, Draw(call, x.device))
    results = [_runner(call, bound, name)() for name in ("triton", "aten")]
    assert len(results[0]) == 3  # and the gradients of both
    torch.testing.assert_close(*results)

def chosen():
    from segfast.ops import _gpu, prelu
    from segfast.ops._choice import collect
    with collect() as collected:
        segfast.functional.prelu(x, w)  # on a CPU there is nothing to choose
        assert not collected.counts
    asked = []
    prelu.choose = lambda *args: asked.append(args) or "triton"
    prelu.kernel_reason_not = lambda *args: None
    torch.Tensor.is_cuda = True
    try:
        (explanation,) = segfast.explain(segfast.functional.prelu, x, w)
    finally:
        del torch.Tensor.is_cuda
    assert asked == [("prelu", (x,), (w,), (), False)] and explanation.backend == "triton"

def launches():
    with segfast.backend("triton"), segfast.kernels.record_launches() as recorded:
        segfast.functional.prelu(x.detach(), w.detach())
    (launch, pointers), = recorded
    assert launch.constants == {"CHANNELS": 3, "BLOCK": 1024} and len(pointers) == 3

CHECKS = (registered, dispatch, values, autograd, opcheck, compiled, flops, optimize, proofs, benchmark,
          measured, launches, chosen)
for check in CHECKS:
    try:
        check()
        print(check.__name__)
    except BaseException:
        traceback.print_exc()
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the package with the page's files and its lines in the four lists."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("kernels", "segfast", "benchmarks"):
        shutil.copytree(
            ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, code in FILES.items():
        assert not (root / name).exists()
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(code)
    for name, (anchor, line, export) in LISTS.items():
        text = (root / name).read_text()
        text = re.sub(rf"^( *){re.escape(anchor)}", rf"\1{line}\n\g<0>", text, count=1, flags=re.MULTILINE)
        text = text.replace("__all__ = [", f'__all__ = ["{export}", ').replace(
            "FAMILIES = (", 'FAMILIES = ("prelu", '
        )
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def passed(tree) -> tuple[list[str], str]:
    """The checks that passed in the tree, and what the others printed."""
    result = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    return result.stdout.split(), result.stderr


def test_it_compiles_for_a_gpu(tree):
    command = [sys.executable, "-m", "segfast", "compile-report", "--family", "prelu", "--arch", "sm_90"]
    result = subprocess.run([*command, "--dtype", "bf16"], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kernels, 0 with a problem" in result.stdout


def test_the_page_has_a_file_for_every_layer():
    assert list(FILES) == [
        "kernels/prelu.py",
        "segfast/ops/prelu/__init__.py",
        "segfast/ops/prelu/cases.py",
        "segfast/nn/prelu.py",
    ]


@pytest.mark.parametrize("check", re.findall(r"^def (\w+)", CHECKS, re.MULTILINE))
def test_the_family_works(check, passed):
    names, errors = passed
    assert check in names, errors


def test_its_source_keeps_the_rules():
    kernel = ast.parse(FILES["kernels/prelu.py"])
    assert [rule.__name__ for rule in RULES if list(rule(kernel))] == []
    for name, code in FILES.items():
        module = name.removesuffix(".py").replace("/", ".")
        module = module if module.startswith("segfast") else f"segfast.{module}"
        assert upward_imports(module, ast.parse(code)) == []


def test_its_source_is_clean(tree):
    files = [str(tree / name) for name in FILES]
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout
