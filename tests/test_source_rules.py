"""Rules for kernel source that neither the interpreter nor the compiler checks, read from the syntax tree.

A masked load without `other=` returns 0 in the interpreter and garbage on a GPU; int32 offsets wrap only past
2**31 elements; floating-point atomics are nondeterministic only on a GPU.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "kernels").rglob("*.py"))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call in `tree` with the last part of its name: `load` for `tl.load(...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            yield name, node


def jit_functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]


def masked_load_needs_other(tree: ast.AST) -> Iterator[int]:
    for name, call in calls(tree):
        keywords = {keyword.arg for keyword in call.keywords}
        masked = "mask" in keywords or len(call.args) > 1
        if name == "load" and masked and "other" not in keywords and len(call.args) < 3:
            yield call.lineno


def banned_call(tree: ast.AST) -> Iterator[int]:
    """autotune needs a driver; block pointers are deprecated; a float's atomic_add is not deterministic."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"autotune", "make_block_ptr", "atomic_add"}:
            yield node.lineno


def absolute_import(tree: ast.AST) -> Iterator[int]:
    """kernels/ works under any name it is published as: it reaches its own files by relative imports only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        else:
            continue
        if any(module.split(".")[0] in {"segfast", "kernels"} for module in modules):
            yield node.lineno


def kernel_name(tree: ast.AST) -> Iterator[int]:
    """A kernel (a jit function that asks for its program id) is `_..._kernel`; no other jit function is."""
    for function in jit_functions(tree):
        launched = any(name == "program_id" for name, _ in calls(function))
        named = function.name.startswith("_") and function.name.endswith("_kernel")
        if launched != named:
            yield function.lineno


def two_dots_into_one(tree: ast.AST) -> Iterator[int]:
    """Two dots into one accumulator miscompile on Blackwell: in a loop each dot adds to one of its own."""
    for function in jit_functions(tree):
        for loop in ast.walk(function):
            if isinstance(loop, ast.For | ast.While):
                sums = [_summed_into(statement) for statement in ast.walk(loop)]
                names = [name for name in sums if name]
                if len(set(names)) < len(names):
                    yield loop.lineno


def _summed_into(statement: ast.AST) -> str | None:
    """The accumulator of a statement's dot: what it adds to, or is given as its third argument."""
    if not isinstance(statement, ast.Assign | ast.AugAssign):
        return None
    for name, call in calls(statement.value):
        if name in {"dot", "dot_scaled"}:
            given = [*call.args[2:3], *(k.value for k in call.keywords if k.arg == "acc")]
            target = statement.target if isinstance(statement, ast.AugAssign) else None
            return next((ast.unparse(node) for node in (*given, target) if node is not None), None)
    return None


class _Widths(ast.NodeVisitor):
    """Follows values made from `tl.program_id` and notes where a 32-bit one is multiplied by a stride."""

    def __init__(self) -> None:
        self.narrow: set[str] = set()
        self.wide: set[str] = set()
        self.found: list[int] = []

    def is_wide(self, node: ast.AST) -> bool:
        casts = any(
            name in {"to", "cast"} and any("int64" in ast.unparse(argument) for argument in call.args)
            for name, call in calls(node)
        )
        return casts or any(isinstance(n, ast.Name) and n.id in self.wide for n in ast.walk(node))

    def is_narrow(self, node: ast.AST) -> bool:
        from_program = any(name == "program_id" for name, _ in calls(node))
        tainted = any(isinstance(n, ast.Name) and n.id in self.narrow for n in ast.walk(node))
        return (from_program or tainted) and not self.is_wide(node)

    def assign(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
            for element, part in zip(target.elts, values, strict=True):
                self.assign(element, part)
        elif isinstance(target, ast.Name):
            wide, narrow = self.is_wide(value), self.is_narrow(value)
            self.wide.discard(target.id)
            self.narrow.discard(target.id)
            if wide:
                self.wide.add(target.id)
            # The offset of a tap is bounded by the convolution kernel's size.
            elif narrow and not target.id.startswith("tap"):
                self.narrow.add(target.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult):
            self.product(node.target, node.value, node.lineno)
        self.assign(node.target, ast.BinOp(node.target, node.op, node.value))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult):
            self.product(node.left, node.right, node.lineno)

    def product(self, left: ast.AST, right: ast.AST, line: int) -> None:
        if self.is_wide(left) or self.is_wide(right):
            return
        for index, stride in ((left, right), (right, left)):
            names = [n.id for n in ast.walk(stride) if isinstance(n, ast.Name)]
            # `stride_xn` is a tensor's; `STRIDE_H` in capitals is the convolution's own, a few units.
            if self.is_narrow(index) and any("stride" in name for name in names):
                self.found.append(line)
                return


def narrow_offset(tree: ast.AST) -> Iterator[int]:
    """A program id is cast to int64 before it is multiplied by a stride."""
    for function in jit_functions(tree):
        widths = _Widths()
        widths.visit(function)
        yield from widths.found


def inline_assembly_without_plain_form(tree: ast.AST) -> Iterator[int]:
    """Inline assembly stands under `if PTX:`, so that devices that know Triton's IR only run the kernel."""
    guarded = {
        id(call)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If | ast.IfExp) and ast.unparse(branch.test).startswith("PTX")
        for _, call in calls(branch)
    }
    for name, call in calls(tree):
        if name.startswith("inline_asm") and id(call) not in guarded:
            yield call.lineno


def documented(tree: ast.AST) -> Iterator[tuple[ast.Module | ast.ClassDef | ast.FunctionDef, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node, text


def docstring_that_asks(tree: ast.AST) -> Iterator[int]:
    """A docstring is a noun phrase or says what is done: it opens with no "Whether", "What" or "Which"."""
    for node, text in documented(tree):
        if text.split()[0] in {"Whether", "What", "Which"}:
            yield node.body[0].lineno


def test_no_docstring_asks():
    folders = ("segfast", "kernels", "benchmarks", "tests", "examples")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    asking = [f"{path.relative_to(ROOT)}:{n}" for path in files for n in docstring_that_asks(_parsed(path))]
    assert asking == []


BRITISH = re.compile(
    r"colour|centre|neighbour|behaviour|\bgrey|labelled|modelled|cancelling|learnt|judgement|licence"
    r"|(normal|special|initial|summar|optim|recogn|quant|real)is(e|ed|es|er|ing|ation)\b",
    re.IGNORECASE,
)


def test_spelling_is_american():
    """As in torch, so that a name can be guessed."""
    folders = ("segfast", "kernels", "benchmarks", "tests", "docs", "examples")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")
    ]
    assert BRITISH.search("a normaliser") and not BRITISH.search("a normalizer, precise, realism")
    found = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        if path != Path(__file__)
        for match in BRITISH.finditer(path.read_text())
    }
    assert sorted(found) == []


def _parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


RULES = [
    inline_assembly_without_plain_form,
    masked_load_needs_other,
    banned_call,
    absolute_import,
    kernel_name,
    two_dots_into_one,
    narrow_offset,
]


def test_the_rules_read_some_kernels():
    assert sum(len(jit_functions(ast.parse(path.read_text()))) for path in FILES) >= 4


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    broken = [
        f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in rule(ast.parse(path.read_text()))
    ]
    assert not broken, rule.__doc__ or rule.__name__


KERNEL = "@triton.jit\ndef _toy_kernel(x, stride_x, BLOCK):\n    row = tl.program_id(0)\n    "

BREAKS = [
    (docstring_that_asks, 'def f():\n    """Whether x."""', 'def f():\n    """True if x."""'),
    (docstring_that_asks, '"""What is kept."""', '"""The tensors that are kept."""'),
    (
        inline_assembly_without_plain_form,
        KERNEL + "x = tl.inline_asm_elementwise(x)",
        KERNEL + "if PTX:\n        x = tl.inline_asm_elementwise(x)",
    ),
    (masked_load_needs_other, "tl.load(x, mask=m)", "tl.load(x, mask=m, other=0.0)"),
    (masked_load_needs_other, "tl.load(x, m)", "tl.load(x)"),
    (banned_call, "@triton.autotune(configs=[])\ndef f(): ...", "@triton.jit\ndef f(): ..."),
    (banned_call, "tl.make_block_ptr(x)", "tl.make_tensor_descriptor(x)"),
    (banned_call, "tl.atomic_add(x, y)", "tl.store(x, y)"),
    (absolute_import, "import segfast.kernels", "import segfaster"),
    (absolute_import, "from kernels import _device", "from . import _device"),
    (kernel_name, KERNEL.replace("_toy_kernel", "toy_kernel"), KERNEL),
    (
        kernel_name,
        "@triton.jit\ndef _act_kernel(x): ...",
        "@triton.jit\ndef _act(x): ...",
    ),
    (
        two_dots_into_one,
        KERNEL + "for k in range(4):\n        a = tl.dot(x, x, a)\n        a = tl.dot(x, x, a)",
        KERNEL + "for k in range(4):\n        s = tl.dot(x, x)\n        a = tl.dot(s, x, a)",
    ),
    (
        two_dots_into_one,
        KERNEL + "for k in range(4):\n        a += tl.dot(x, x)\n        a = tl.dot(x, x, acc=a)",
        KERNEL + "for k in range(4):\n        a += tl.dot(x, x)\n        b = tl.dot(x, x, acc=b)",
    ),
    (narrow_offset, KERNEL + "x += row * stride_x", KERNEL + "x += row.to(tl.int64) * stride_x"),
    (
        narrow_offset,
        KERNEL + "i = row * BLOCK + tl.arange(0, 8)\n    p = x + i[:, None] * stride_x",
        KERNEL + "i = row.to(tl.int64) * BLOCK + tl.arange(0, 8)\n    p = x + i[:, None] * stride_x",
    ),
    (
        narrow_offset,
        KERNEL + "a, b = row // 2, row % 2\n    b *= stride_x",
        KERNEL + "a, b = row // 2, tl.cast(row, tl.int64)\n    b *= stride_x",
    ),
]


@pytest.mark.parametrize(("rule", "bad", "good"), BREAKS)
def test_rule_tells_bad_from_good(rule, bad, good):
    assert list(rule(ast.parse(bad)))
    assert not list(rule(ast.parse(good)))
