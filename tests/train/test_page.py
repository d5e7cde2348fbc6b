"""The page on training says what is so."""

import argparse
import re
from pathlib import Path

from segfast.commands import train
from segfast.data._folder import MOST_KEPT
from segfast.train._augment import AUGMENTATIONS

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def parser():
    found = argparse.ArgumentParser()
    train.add_arguments(found)
    return found


def test_its_options_exist_with_the_values_it_says(monkeypatch):
    known = {name for action in parser()._actions for name in action.option_strings}
    elsewhere = {"--nproc-per-node", "--help"}
    assert set(re.findall(r"--[a-z][a-z-]*", PAGE)) - elsewhere <= known
    assert "`--checkpoint-every` steps (100)" in PAGE and parser().get_default("checkpoint_every") == 100
    assert "columns (0.25)" in PAGE and parser().get_default("holdout") == 0.25
    assert f"--augment {','.join(AUGMENTATIONS)}:" in PAGE.replace("`:", ":")
    assert "up to 2 GiB" in PAGE and MOST_KEPT == 2 * 2**30
    for ending in train.ENDINGS:
        assert f"`FILE{ending}" in PAGE


def test_its_program_runs():
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    space = {}
    exec(program, space)
    assert space["trainer"].step == 2
