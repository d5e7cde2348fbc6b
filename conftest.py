"""The `--benchmark` flag. Without it pytest runs each benchmark once, as a smoke test."""

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run benchmarks/ only, properly, and write out/benchmark/: JSON, CSV and an HTML report",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        return
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benchmarks")]
