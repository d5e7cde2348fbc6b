"""The shape of the tree: imports run models -> nn -> ops -> kernels, families have a file in every layer."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import segfast
from segfast.ops import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up: a module imports its own layer and those before it.
LAYERS = ("segfast.kernels", "segfast.ops", "segfast.functional", "segfast.nn", "segfast.models")
# What sits on top of the layers, for whom they must not care.
ABOVE = (
    *("segfast._optimize", "segfast._profile", "segfast.commands", "segfast.train", "segfast.data"),
    *("segfast.predict", "segfast.cli", "benchmarks", "tests"),
)
# What is private in the root of the package: packages of their own, and what every layer may use.
IN_ROOT = {"_errors.py", "_files.py", "_optimize", "_profile", "_table.py", "_timing.py"}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the package."""
    for folder, prefix in ((ROOT / "segfast", "segfast"), (ROOT / "kernels", "segfast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([prefix, *parts]), path


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of what the module `name` imports, at its top and inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def layer(name: str) -> int | None:
    """The position in LAYERS; past the last for what is above them; None for helpers (`segfast._files`)."""
    for position, prefix in enumerate(LAYERS):
        if name == prefix or name.startswith(prefix + "."):
            return position
    if any(name == prefix or name.startswith(prefix + ".") for prefix in ABOVE):
        return len(LAYERS)
    return None


def upward_imports(name: str, tree: ast.AST) -> list[str]:
    own = layer(name)
    found = [(target, layer(target)) for target in imported(name, tree)]
    return [f"{name} -> {target}" for target, other in found if None not in (own, other) and other > own]


def test_imports_run_downward():
    seen = list(modules())
    assert len(seen) > 20
    assert [bad for name, path in seen for bad in upward_imports(name, ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("segfast.kernels.conv.forward", "from ...ops import _layout"),
        ("segfast.kernels._device", "import segfast.nn"),
        ("segfast.ops._backend", "from segfast.functional import up_concat"),
        ("segfast.ops._backend", "def f():\n    from .. import nn"),
        ("segfast.nn.init", "from ..models import unet"),
        ("segfast.nn.init", "from segfast import _optimize"),
        ("segfast.models.unet", "from benchmarks import cases"),
    ],
)
def test_an_upward_import_is_seen(name, source):
    assert upward_imports(name, ast.parse(source))
    assert not upward_imports("segfast.cli", ast.parse(source))


def imports(name: str, path: Path) -> Iterator[tuple[ast.stmt, str, bool]]:
    """The imports of the module `name`: the statement, what it imports, and True if it is in a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.stmt, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, inside
            elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                yield from walk(child, inside or isinstance(child, ast.FunctionDef))

    for statement, inside in walk(ast.parse(path.read_text()), False):
        for target in imported(name, ast.Module([statement], [])):
            yield statement, target, inside


def test_no_module_imports_itself_by_way_of_others():
    files = {name.removesuffix(".__init__"): (name, path) for name, path in modules()}
    left: dict[str, set[str]] = {}
    for module, (name, path) in files.items():
        found = {target for _, target, inside in imports(name, path) if not inside and target in files}
        # The packages that it lies in are being imported already.
        left[module] = {target for target in found if not f"{module}.".startswith(f"{target}.")}
    while done := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in done}
    assert sorted(left) == []


def test_an_import_of_ours_within_a_function_says_why():
    found = []
    for name, path in modules():
        lines = path.read_text().splitlines()
        for statement, target, inside in imports(name, path):
            if inside and target.startswith("segfast") and "#" not in lines[statement.lineno - 1]:
                found.append(f"{name}:{statement.lineno}: {target}")
    assert found == []


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_its_file_in_every_layer(family):
    for folder in (ROOT / "kernels", ROOT / "segfast" / "ops", ROOT / "segfast" / "nn"):
        assert (folder / f"{family}.py").is_file() or (folder / family / "__init__.py").is_file(), folder
    for kind in ("kernels", "op", "module"):
        assert list((ROOT / "tests" / family).glob(f"test_{kind}*.py")), kind
    assert (ROOT / "benchmarks" / f"test_bench_{family}.py").is_file()


@pytest.mark.parametrize("folder", ["kernels", "segfast/ops", "segfast/nn"])
def test_a_folder_in_a_layer_is_a_family(folder):
    """Whoever searches a family finds all of it under its name."""
    folders = {path.name for path in (ROOT / folder).iterdir() if (path / "__init__.py").is_file()}
    assert folders - {"_fused"} == set(FAMILIES) - {path.stem for path in (ROOT / folder).glob("*.py")}


def test_the_root_of_the_package_holds_only_what_every_layer_uses():
    private = {path.name for path in (ROOT / "segfast").iterdir() if re.match(r"_[a-z]", path.name)}
    assert private == IN_ROOT


def test_every_package_folder_has_an_init():
    folders = {
        path.parent for top in ("kernels", "segfast", "benchmarks") for path in (ROOT / top).rglob("*.py")
    }
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_the_link_makes_the_tree_importable():
    link = ROOT / "segfast" / "kernels"
    assert str(link.readlink()) == "../kernels"


def test_one_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'name = "torch-segfast"' in project
    assert f'\nversion = "{segfast.__version__}"\n' in project
    assert f"## {segfast.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_absolute_machine_paths():
    folders = [ROOT / n for n in (".ci", "kernels", "segfast", "benchmarks", "tests", "docs", "examples")]
    files = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    text = {".cfg", ".csv", ".json", ".md", ".mk", ".py", ".toml", ".txt", ".in"}
    files = [f for f in files if f.is_file() and (f.suffix in text or f.name in ("Makefile", "run"))]
    machine = re.compile(r"(?<![\w.~>])/(?:work|root|home|Users|tmp|farm|opt)/")
    assert machine.search('open("/tmp/x")') and not machine.search("out/tmp/x")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        if path != Path(__file__)
        for line in path.read_text().splitlines()
        if machine.search(line)
    ]
    assert len(files) > 50
    assert found == []
