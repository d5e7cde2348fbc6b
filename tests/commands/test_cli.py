"""The `segfast` command itself: table, exit codes, laziness."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

import segfast
from segfast import cli
from segfast._errors import UserError

ROOT = Path(cli.__file__).parent.parent


@pytest.fixture
def command(monkeypatch):
    """A subcommand `fake` whose `run` is the function given."""

    def install(run):
        module = types.ModuleType("fake_command")
        module.add_arguments = lambda parser: parser.add_argument("--times", type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "pretend"))

    return install


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: segfast")
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"  {name} " in out and summary in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"segfast {segfast.__version__}\n"


def test_arguments_reach_the_command_and_its_exit_code_comes_back(command):
    command(lambda args: args.times)
    assert cli.main(["fake", "--times", "7"]) == 7


def test_a_commands_own_help(command, capsys):
    command(lambda args: 0)
    assert cli.main(["fake", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: segfast fake") and "pretend" in out and "--times" in out


@pytest.mark.parametrize("arguments", [["fake", "--times", "x"], ["fake", "--tims", "1"], ["fake", "extra"]])
def test_arguments_it_does_not_know_exit_2(command, capsys, arguments):
    command(lambda args: 0)
    assert cli.main(arguments) == 2
    assert "segfast fake: error:" in capsys.readouterr().err


def test_an_unknown_command(capsys):
    assert cli.main(["chek"]) == 2
    assert capsys.readouterr().err == f"segfast: no command 'chek'; there are {', '.join(cli.COMMANDS)}\n"


def test_a_users_mistake_is_one_line(command, capsys):
    def run(args):
        raise UserError("--size must be HxW")

    command(run)
    assert cli.main(["fake"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "segfast: --size must be HxW\n" and captured.out == ""


def test_an_interrupt_exits_130(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "segfast: interrupted\n"


def test_our_own_faults_keep_their_traceback(command):
    def run(args):
        raise ZeroDivisionError

    command(run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_is_there(name, capsys):
    path = cli.COMMANDS[name][0]
    assert importlib.util.find_spec(path) is not None
    assert cli.main([name, "--help"]) == 0
    assert f"usage: segfast {name}" in capsys.readouterr().out


def test_python_m_segfast_imports_only_what_it_runs():
    code = (
        "import sys; from segfast import cli; code = cli.main(sys.argv[1:]); "
        "print(sorted(set(sys.modules) & {path for path, _ in cli.COMMANDS.values()})); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "check", "none", "--size", "8x8"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 2
    assert result.stdout == "['segfast.commands.check']\n"
    result = subprocess.run(
        [sys.executable, "-m", "segfast", "nothing"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 2 and "no command 'nothing'" in result.stderr
