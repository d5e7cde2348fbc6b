"""Nothing that `make test` asserts depends on how fast or how busy a machine is, read from the syntax tree.

Benchmarks read clocks and report what they find. No test asserts it, gives up after some seconds or sleeps; a
test that needs times puts a stand-in for the clock in place: `monkeypatch.setattr(module, "time", ...)`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("test_*.py")])
CLOCKS = {
    *("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "elapsed_time"),
    *("process_time", "process_time_ns", "thread_time", "thread_time_ns"),
    # Ours, which return times.
    *("interleave", "blocks", "graph_us"),
}
WAITS = {"sleep", "alarm", "setitimer"}
# Seconds: a guard against a hang, which no busy machine comes near.
GUARD = 600


def called(node: ast.AST) -> Iterator[str]:
    """The last part of the name of every function called in `node`."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield getattr(call.func, "attr", getattr(call.func, "id", ""))


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def clocks_of(tree: ast.AST) -> set[str]:
    """The clocks, and the functions here that return what a clock said."""
    found, before = set(CLOCKS), 0
    while len(found) > before:
        before = len(found)
        for function in functions(tree):
            timed = timed_names(function, found)
            returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]
            if any(is_timed(value, timed, found) for value in returned):
                found.add(function.name)
    return found


def is_timed(node: ast.AST, timed: set[str], clocks: set[str]) -> bool:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return bool(names & timed) or bool(clocks & set(called(node)))


def timed_names(function: ast.FunctionDef, clocks: set[str]) -> set[str]:
    """The names in a function that hold what a clock said, or something made of it."""
    timed: set[str] = set()
    before = -1
    while len(timed) > before:
        before = len(timed)
        for node in ast.walk(function):
            targets: list[ast.AST] = []
            if isinstance(node, ast.Assign):
                targets, value = list(node.targets), node.value
            elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
                targets, value = [node.target], node.value
            elif isinstance(node, ast.For | ast.comprehension):
                targets, value = [node.target], node.iter
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # list.append and its like
                targets, value = [node.func.value], ast.Tuple([*node.args])
            if targets and is_timed(value, timed, clocks):
                timed |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return timed


def has_a_stand_in(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(call, ast.Call)
        and getattr(call.func, "attr", "") == "setattr"
        and any(isinstance(a, ast.Constant) and a.value == "time" for a in call.args)
        for call in ast.walk(function)
    )


def asserted_time(tree: ast.AST) -> Iterator[int]:
    """No assert, and no other way to fail, looks at a time that was measured."""
    clocks = clocks_of(tree)
    for function in functions(tree):
        if has_a_stand_in(function):
            continue
        timed = timed_names(function, clocks)
        for node in ast.walk(function):
            failing = isinstance(node, ast.Assert | ast.Raise)
            failing |= isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("fail", "exit")
            if failing and is_timed(node, timed, clocks):
                yield node.lineno
            # What fails where a time decides.
            if isinstance(node, ast.If | ast.While) and is_timed(node.test, timed, clocks):
                inside = [n for statement in node.body for n in ast.walk(statement)]
                yield from (n.lineno for n in inside if isinstance(n, ast.Assert | ast.Raise))


def time_limit(tree: ast.AST) -> Iterator[int]:
    """Nothing is given up after some seconds, but what would otherwise hang, after ten minutes."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            for keyword in call.keywords:
                value = keyword.value
                short = isinstance(value, ast.Constant) and isinstance(value.value, int | float)
                if keyword.arg == "timeout" and short and value.value < GUARD:
                    yield call.lineno


def wait(tree: ast.AST) -> Iterator[int]:
    """Nothing sleeps in the hope that something else has happened meanwhile."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and WAITS & {getattr(node.func, "attr", getattr(node.func, "id", ""))}:
            yield node.lineno


RULES = [asserted_time, time_limit, wait]


def test_the_rules_read_the_benchmarks():
    assert len(FILES) > 80
    assert any(CLOCKS & set(called(ast.parse(path.read_text()))) for path in FILES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    broken = [
        f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in rule(ast.parse(path.read_text()))
    ]
    assert not broken, rule.__doc__


TIMES = """def test():
    times = interleave(runs, device)
    best = max(0.0, times['a'].us / times['b'].us)
    """
SECONDS = """def test():
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    """
HELPER = "def ratio():\n    times = interleave(runs, device)\n    return times['a'].us\n"

BREAKS = [
    (asserted_time, TIMES + "assert best >= 1.0", TIMES + "print(best)"),
    (asserted_time, SECONDS + "assert took < 2", SECONDS + "assert run() == 3"),
    (
        asserted_time,
        TIMES + "ratios = []\n    ratios.append(best)\n    pytest.fail(f'{min(ratios)}')",
        TIMES + "ratios = []\n    ratios.append(best)\n    report(ratios)",
    ),
    (asserted_time, TIMES + "if best < 1:\n        raise ValueError", TIMES + "if best < 1:\n        pass"),
    (
        asserted_time,
        HELPER + "def test():\n    assert ratio() > 1",
        HELPER + "def test():\n    print(ratio())",
    ),
    (
        asserted_time,
        TIMES + "assert best == 5",
        TIMES.replace("times =", "monkeypatch.setattr(_timing, 'time', clock)\n    times =")
        + "assert best == 5",
    ),
    (time_limit, "subprocess.run(command, timeout=300)", "subprocess.run(command, timeout=600)"),
    (wait, "time.sleep(0.05)", "thread.join()"),
]


@pytest.mark.parametrize(("rule", "bad", "good"), BREAKS)
def test_rule_tells_bad_from_good(rule, bad, good):
    assert list(rule(ast.parse(bad)))
    assert not list(rule(ast.parse(good)))
