"""For tests, doctests and benchmarks: a cache of their own, and the `--benchmark` flag.

Without the flag pytest runs each benchmark once, as a smoke test.
"""

import itertools

import pytest

_NUMBERS = itertools.count()


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


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing that tests measure or prove comes into the user's cache, nor from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGFAST_CACHE", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(autouse=True)
def cache(own_cache, request, monkeypatch):
    """The test's own cache, empty, and nothing is known yet; benchmarks that measure see to theirs."""
    if request.config.getoption("--benchmark"):
        yield own_cache
        return
    from tests.forget import forget

    monkeypatch.setenv("SEGFAST_CACHE", str(folder := own_cache / str(next(_NUMBERS))))
    forget()
    yield folder
    forget()
