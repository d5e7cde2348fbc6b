"""The package as users get it: wheel, sdist, editable, the bare checkout; and what importing it costs.

Python runs with `-S` and an explicit path, so that an editable install in this environment cannot stand in
for what is tested.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
NOT_SOURCE = (".git", ".venv", ".*_cache", ".benchmarks", "__pycache__", "*.egg-info", "build", "dist", "out")
IMPORT = "import segfast, segfast.kernels as k; print(segfast.__file__, k.__file__, sep=chr(10)); k.Tile"


def run(code: str, *paths: Path, cwd: Path, **environment: str) -> list[str]:
    """The lines that `code` prints in a fresh interpreter that sees `paths` and torch."""
    path = os.pathsep.join([*map(str, paths), *SITE])
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


def pip(*arguments: str | Path, cwd: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        *map(str, arguments),
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout, link included: building writes into the tree."""
    copy = tmp_path_factory.mktemp("checkout") / "tree"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    assert (copy / "segfast" / "kernels").is_symlink()
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", folder, tree, cwd=folder)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The sdist's tree: without the link."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    assert not (root / "segfast" / "kernels").exists()
    return root


def assert_importable_from(target: Path, elsewhere: Path) -> None:
    package, kernels = run(IMPORT, target, cwd=elsewhere)
    assert Path(package) == target / "segfast" / "__init__.py"
    assert Path(kernels) == target / "segfast" / "kernels" / "__init__.py"


def sources(pattern: str = "*.py") -> set[str]:
    """Installed names of the files that both packages hold."""
    ours = {p.relative_to(ROOT) for p in (ROOT / "segfast").rglob(pattern)}
    kernels = {Path("segfast") / p.relative_to(ROOT) for p in (ROOT / "kernels").rglob(pattern)}
    return {str(p) for p in ours | kernels if "__pycache__" not in p.parts}


def test_wheel_holds_every_module_and_the_data_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("torch_segfast-")
    assert len(names) == len(set(names))
    data = ("*.json", "*.html", "*.npz", "*.safetensors", "*.jpg", "py.typed")
    wanted = sources().union(*map(sources, data))
    some = ("data/nuclei.npz", "data/selfie_segmenter.safetensors", "py.typed", "measured/proven.json")
    some += ("_profile/page.html",)
    assert {f"segfast/{name}" for name in some} <= wanted
    assert wanted <= set(names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"segfast"}


def test_wheel_installs_and_imports_from_elsewhere(wheel, tmp_path):
    pip("install", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    assert_importable_from(tmp_path / "site", tmp_path)
    code = "from segfast.ops._choice_files import measured_folders; print(measured_folders()[0])"
    (folder,) = run(code, tmp_path / "site", cwd=tmp_path)
    assert (Path(folder) / "proven.json").is_file()
    # torch.compile(backend="segfast") needs no import of segfast before.
    code = "import torch, sys; f = torch._dynamo.lookup_backend('segfast'); print(f.__module__)"
    assert run(code, tmp_path / "site", cwd=tmp_path) == ["segfast._optimize.compiled"]


def test_sdist_installs_and_imports_from_elsewhere(sdist, tmp_path):
    pip("install", "--target", tmp_path / "site", sdist, cwd=tmp_path)
    assert_importable_from(tmp_path / "site", tmp_path)


def test_sdist_carries_what_testing_and_benchmarks_need(unpacked):
    wanted = [
        "conftest.py",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "benchmarks/cases.py",
        "segfast/data/nuclei.npz",
        "tests/data/selfie_segmentation.tflite",
        "segfast/measured/proven.json",
        "docs/adding-an-operator.md",
    ]
    assert [name for name in wanted if not (unpacked / name).is_file()] == []


def test_editable_install_imports_the_tree(tree, tmp_path):
    pip("install", "--target", tmp_path / "site", "-e", tree, cwd=tmp_path)
    # A .pth file counts only in a site directory; the finder it imports may be in this environment's too.
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); {IMPORT}"
    package, kernels = run(code, tmp_path / "site", cwd=tmp_path)
    assert Path(package) == tree / "segfast" / "__init__.py"
    assert Path(kernels).resolve() == tree / "kernels" / "__init__.py"


def test_uninstalled_tree_imports(tree):
    package, kernels = run(IMPORT, cwd=tree)
    assert Path(package) == tree / "segfast" / "__init__.py"
    assert Path(kernels).resolve() == tree / "kernels" / "__init__.py"


def test_bare_import_of_kernels_offers_nothing():
    # As transformers does with Hugging Face's package of that name: import it, then look for its attributes.
    code = """
import kernels, sys
print("Tile" in vars(kernels), "triton" in sys.modules)
try:
    kernels.get_kernel
except AttributeError as error:
    print(error)
try:
    from kernels import LayerRepository
except ImportError:
    print("ImportError")
"""
    names, message, missing = run(code, cwd=ROOT)
    assert (names, missing) == ("False False", "ImportError")
    assert "import segfast.kernels" in message


@pytest.mark.parametrize(
    "first", ["from kernels import get_kernel", "import kernels.layer", "import segfast"]
)
def test_bare_import_of_kernels_hands_over_to_the_installed_package(tmp_path, first):
    """transformers' imports find Hugging Face's package although this folder comes first on the path."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .layer import Mode\ndef get_kernel(): return 'theirs'\n")
    (package / "layer.py").write_text("import kernels\nclass Mode: home = kernels\n")
    code = f"""
{first}
from kernels import get_kernel
import kernels, kernels.layer, sys
print(get_kernel(), kernels.__file__, kernels.__spec__.name, hasattr(kernels, "Tile"))
print(kernels.layer.Mode.home is kernels is sys.modules["kernels"])
import segfast.kernels
print(segfast.kernels.Tile.__name__, segfast.kernels is kernels)
"""
    # A second checkout on the path is none of theirs either.
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "kernels").symlink_to(ROOT / "kernels")
    theirs, same, ours = run(code, twin, package.parent, cwd=ROOT)
    assert theirs == f"theirs {package / '__init__.py'} kernels False"
    assert (same, ours) == ("True", "Tile False")


def test_an_error_in_the_installed_kernels_package_is_told_as_it_is(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('theirs is broken')\n")
    code = "try:\n    import kernels\nexcept ImportError as error:\n    print(error)"
    assert run(code, tmp_path, cwd=ROOT) == ["theirs is broken"]


def test_import_touches_no_driver_compiler_or_network(tmp_path):
    # torch.utils.flop_counter imports triton; loading its driver or compiling would come later.
    code = """
import sys, torch
def refuse(event, arguments):
    driver = "dlopen" in event and any(name in str(arguments) for name in ("cuda", "nvidia", "nvml", "hip"))
    if driver or event.startswith(("socket.", "subprocess.", "os.system", "os.posix_spawn")):
        raise RuntimeError(f"import segfast: {event} {arguments}")
sys.addaudithook(refuse)
import segfast
print(torch.cuda.is_initialized())
print("segfast.kernels" in sys.modules)
print("triton" in sys.modules and sys.modules["triton"].runtime.driver._active is not None)
"""
    cache = tmp_path / "triton"
    lines = run(code, ROOT, cwd=tmp_path, TRITON_CACHE_DIR=str(cache))
    assert lines == ["False", "False", "False"]
    assert not cache.exists()


def test_import_loads_no_package_that_torch_does_not(tmp_path):
    """It costs our own modules; torch's counter of operations imports triton."""
    code = """
import sys, torch, torch.utils.flop_counter
before = set(sys.modules)
import segfast
print(*sorted(set(sys.modules) - before), sep=chr(10))
"""
    found = [name.split(".")[0] for name in run(code, ROOT, cwd=tmp_path)]
    assert "segfast" in found
    assert {name for name in found if name not in sys.stdlib_module_names} == {"segfast"}


def test_documentation_never_installs_the_other_segfast():
    """PyPI's `segfast` is another project; ours is `torch-segfast`."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "segfast").rglob("*.py")]
    wrong = re.compile(r"pip3? install [^`\n]*(?<![-\w/.])segfast")
    assert len(pages) > 5
    assert [str(p.relative_to(ROOT)) for p in pages if wrong.search(p.read_text())] == []


def test_make_compat_tries_the_oldest_versions_that_are_promised():
    script = (ROOT / ".ci" / "compat").read_text()
    promised = re.search(
        r'dependencies = \["torch>=([\d.]+)", "triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text()
    )
    tried = re.search(r'"torch==([\d.]+)\.0" "triton==([\d.]+)\.0"', script)
    assert promised and tried and promised.groups() == tried.groups()


def test_a_python_is_found_by_its_version_and_one_that_is_not_there_is_not():
    def find(*versions: str) -> subprocess.CompletedProcess:
        return subprocess.run([ROOT / ".ci" / "find-python", *versions], capture_output=True, text=True)

    missing = find("2.0")
    assert (missing.returncode, missing.stdout) == (1, "")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = find("2.0", here)
    if found.returncode == 0:  # this Python itself need not be on PATH
        version = subprocess.run([found.stdout.strip(), "--version"], capture_output=True, text=True).stdout
        assert version.startswith(f"Python {here}.")


def test_make_simulate_says_in_one_line_that_there_is_no_python_for_it(tmp_path):
    folder = tmp_path / "tree"
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    # Neither PATH nor pyenv has another Python than the system's tools bring.
    tools = {**os.environ, "PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path)}
    (tmp_path / "bin").mkdir()
    for tool in ("env", "bash", "dirname", "cmp", "mktemp"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    run = subprocess.run([folder / ".ci" / "simulate"], env=tools, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == (
        "simulate: no Python 3.12 or 3.13 on PATH or in pyenv: the device tests are not run\n"
    )


def test_the_simulated_devices_versions_are_pinned():
    lines = (ROOT / "tests" / "device" / "requirements.txt").read_text().splitlines()
    assert {line for line in lines if "==" in line} == {"torch==2.14.0", "triton==3.8.0", "ttsem==0.1.0"}


def test_pydensecrf_is_not_asked_for_where_it_does_not_build():
    entries = re.findall(r'"(pydensecrf2[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert len(entries) == 2 and {entry.split(";")[1].strip() for entry in entries} == {
        "python_version < '3.13'"
    }
