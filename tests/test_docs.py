"""The pages below docs/: their links, their code, their pictures, and that nothing public is left out."""

import argparse
import importlib
import inspect
import json
import posixpath
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import segfast
from segfast import crf, data, functional, models, nn, predict, train
from segfast.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
ALL = ["README.md", "CONTRIBUTING.md", *PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Whose code other tests run, which look at the results.
RUN_ELSEWHERE = {"adding-an-operator", "compile", "export", "optimize", "predict", "profile", "training"}


def fenced(page, *languages):
    return [code for language, code in BLOCK.findall((ROOT / page).read_text()) if language in languages]


def anchors(page):
    """Names of the headings of a page in links: code hosts and mkdocs agree on all that are linked."""
    text = BLOCK.sub("", (ROOT / page).read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower().strip() for heading in headings]
    return {re.sub(r"[^\w\s-]", "", heading).replace(" ", "-") for heading in plain}


def dead_links(page):
    text = BLOCK.sub("", (ROOT / page).read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        if not (ROOT / target).is_file() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", ALL)
def test_links_and_anchors_lead_somewhere(page):
    assert list(dead_links(page)) == []


def test_a_dead_link_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "here.md").write_text(
        "# One, two\n[a](here.md#one-two) [b](gone.md) [c](#three) [d](#one-two)"
    )
    assert list(dead_links("here.md")) == ["gone.md", "#three"]


def test_each_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- .+: (\S+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    own = [page for page in listed if page != "index.md" and not page.startswith("tree/")]
    assert sorted(f"docs/{page}" for page in own) == PAGES
    others = {page for page in listed if page not in own}
    assert others == {"index.md", "tree/CONTRIBUTING.md", "tree/CHANGELOG.md"}


def public_names():
    """Every function and class that a user may call, by its full name."""
    listed = [segfast, functional, nn, models, train, predict, crf, data]
    for module in listed:
        for name in module.__all__:
            if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name)):
                yield f"{module.__name__}.{name}"
    for module in (nn.init, crf.utils):
        for name, value in vars(module).items():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and name[0] != "_" and name != "as_array":  # which reads the others' arguments
                yield f"{module.__name__}.{name}"


def test_the_reference_has_every_public_name_and_no_other():
    documented = []
    for page in (DOCS / "api").glob("*.md"):
        for name, heading in re.findall(
            r"^::: (\S+)$(?:\n    options:\n      heading: (\S+)$)?", page.read_text(), re.MULTILINE
        ):
            documented.append(heading or name)
            module, _, member = name.rpartition(".")
            assert documented[-1].startswith(
                "segfast." if page.stem == "segfast" else f"segfast.{page.stem}."
            )
            assert hasattr(importlib.import_module(module), member)
    assert len(documented) == len(set(documented))
    assert set(documented) ^ set(public_names()) == set()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if fenced(page, "python") and Path(page).stem not in RUN_ELSEWHERE]
)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = {"theta_alpha": 20.0, "theta_beta": 10.0, "iterations": 2}
    Path("out").mkdir()
    Path("out/crf.json").write_text(json.dumps({"parameters": parameters}))  # as crf-fit writes it
    segfast.save_choices("choices.json")
    space = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for code in fenced(page, "python"):
            exec(compile(code, page, "exec"), space)


@pytest.mark.parametrize("page", ALL)
def test_each_block_says_what_it_is(page):
    languages = {language for language, _ in BLOCK.findall((ROOT / page).read_text())}
    assert languages <= {"python", "sh", "text", "json"}


def refused(command, targets):
    """None for a command line of a page that there is; else the word that there is not."""
    name, *rest = shlex.split(command, comments=True)
    if name == "make":
        return next((word for word in rest if "=" not in word and word not in targets), None)
    if name == "python":
        file = rest[1] if rest[0] == "-m" else rest[0]
        there = ROOT / (file if rest[0] != "-m" else file.replace(".", "/") + ".py")
        return None if there.is_file() or file == "pytest" else file
    if name == "torchrun":
        name, *rest = rest[rest.index("-m") + 1 :]
    if name != "segfast" or rest[0] not in COMMANDS:
        return name
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(COMMANDS[rest[0]][0]).add_arguments(parser)
    try:
        parser.parse_args(rest[1:])
    except (argparse.ArgumentError, SystemExit) as error:
        return str(error)
    return None


def test_the_commands_on_the_pages_exist_with_these_options(capsys):
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([\w-]+)", listed, re.MULTILINE))
    lines = [line for page in ALL for block in fenced(page, "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.split("#")[0].strip()]
    assert len(commands) > 15
    assert {command: why for command in commands if (why := refused(command, targets))} == {}
    assert refused("make nothing", targets) and refused("segfast check x --sizes 1x1", targets)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """The definitions of docs/figures.py, and a folder into which it has drawn."""
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra 'demo')")
    pytest.importorskip("PIL", reason="needs pillow (the extra 'demo')")
    script, folder = runpy.run_path(str(DOCS / "figures.py")), tmp_path_factory.mktemp("figures")
    script["main"](folder)
    return script, folder


def test_every_picture_is_drawn_by_the_script_and_shown(drawings):
    there = {path.name for path in FIGURES.iterdir()}
    assert there == {path.name for path in drawings[1].iterdir()}
    shown = " ".join((ROOT / page).read_text() for page in ALL)
    assert [name for name in sorted(there) if f"figures/{name})" not in shown] == []


def test_the_drawings_say_what_is_so(drawings):
    """Numbers and words of the committed files are those that `python docs/figures.py` draws now."""
    script, folder = drawings

    def words(file):
        return re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text())

    for name in script["DRAWINGS"]:
        assert len(words(folder / name)) > 4
        assert words(FIGURES / name) == words(folder / name), name


def test_the_pictures_are_those_that_the_script_paints(drawings):
    from PIL import Image

    script, folder = drawings
    for name in script["PICTURES"]:
        committed, now = (np.asarray(Image.open(place / name), np.float32) for place in (FIGURES, folder))
        assert committed.shape == now.shape
        assert np.abs(committed - now).mean() < 2, name  # of 255: labels that are as good as equal
