"""The page on predicting says what is so."""

import argparse
import re
from pathlib import Path

from segfast.commands import predict
from segfast.predict import METHODS
from segfast.predict._tiled import FLIPS

PAGE = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()


def test_its_options_exist_with_the_values_it_says():
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]*", PAGE)) - {"--nproc-per-node"}
    assert named <= known and known - named <= {"--device", "-h"}
    assert f"`--tile` ({parser.get_default('tile')} pixels)" in PAGE
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(METHODS)
    for name in FLIPS.keys() - {"none"}:
        assert f"`{name}`" in PAGE or f"--flips {name}`" in PAGE


def test_its_program_runs():
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    space = {}
    exec(program, space)
    assert space["labels"].shape == (90, 120)
