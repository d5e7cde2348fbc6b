"""The README's example runs, and its commands exist."""

import contextlib
import io
import re
import subprocess
from pathlib import Path

from segfast.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert "1 of 1 layers replaced" in printed.getvalue()
    assert "conv_transpose2d: aten (the tensors are on a CPU)" in printed.getvalue()


def test_every_command_it_names_exists():
    named = set(re.findall(r"`segfast ([a-z][a-z-]*)", README))
    assert named <= set(COMMANDS) and {"check", "doctor", "demo", "train", "predict", "tune"} <= named
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([\w-]+)", listed, re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", README)) <= targets | {"help"}


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert len(targets) >= 3
    assert [t for t in targets if not t.startswith("https:") and not (ROOT / t).exists()] == []
