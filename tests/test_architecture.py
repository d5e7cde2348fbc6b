"""The shape of the tree: imports run models -> nn -> ops -> kernels, families have a file in every layer."""

import ast
import re
import subprocess
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
    *("segfast.train", "segfast.data", "segfast.cli", "benchmarks", "tests"),
    *(f"segfast._{name}" for name in ("demo", "check", "doctor", "tune", "optimize", "compile_report")),
)


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
    """The position in LAYERS; past the last for what stands above; None for helpers such as `segfast._files`."""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_its_file_in_every_layer(family):
    for folder in (ROOT / "kernels", ROOT / "segfast" / "ops", ROOT / "segfast" / "nn"):
        assert (folder / f"{family}.py").is_file() or (folder / family / "__init__.py").is_file(), folder
    for folder in ("tests/kernels", "tests/ops", "tests/nn"):
        assert list((ROOT / folder).glob(f"test_{family}*.py")), folder
    assert (ROOT / "benchmarks" / f"test_bench_{family}.py").is_file()


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
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    machine = re.compile(r"(?<![\w.~])/(?:work|root|home|Users|tmp|farm|opt)/")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.is_file()
            and path != Path(__file__)
            and path.suffix in {".py", ".md", ".toml", ".txt", ".mk", ".json", ""}
        ):
            found += [
                f"{name}: {line.strip()}" for line in path.read_text().splitlines() if machine.search(line)
            ]
    assert found == []
