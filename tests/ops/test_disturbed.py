"""Calls that were timed while the machine was busy are timed again, and remembered if the same won."""

import pytest

from segfast.ops import _choice, _measure
from segfast.ops._choice import ATEN, Choice, choices
from tests.ops.test_choice_candidates import CALLS, CONV2D

REAL_CHECK = _measure.quiet_check
FIRST, SECOND = CALLS["large"], CONV2D  # by their multiplications


@pytest.fixture
def measured(cache, monkeypatch):
    """`measured(quiet)`: what was measured of two calls, in order, where each time it was quiet or not.

    Each time another candidate is the fastest, but with `same`.
    """

    def run(*quiet, same=False, **options):
        answers, seen = iter(quiet), []
        monkeypatch.setattr(_measure, "quiet_check", lambda: lambda: next(answers))

        def measure(call):
            seen.append(call)
            name = ATEN if same else ("onednn", ATEN)[seen.count(call) % 2]
            return Choice(name, {name: float(len(seen))})

        monkeypatch.setattr(_measure, "measure", measure)
        found = _measure.measure_and_keep([FIRST, SECOND], **options)
        assert set(found) == set(seen) and next(answers, None) is None
        # In this process all are known.
        assert found == choices().measured
        return seen

    return run


def remembered():
    """The choices that another process knows."""
    _choice.forget_choices()
    return {call: choice.us[choice.name] for call, choice in choices().measured.items()}


def test_in_quiet_each_call_is_measured_once(measured):
    assert measured(True, True) == [FIRST, SECOND]
    assert remembered() == {FIRST: 1, SECOND: 2}


def test_a_disturbed_call_is_measured_again_at_the_end(measured):
    assert measured(False, True, True) == [FIRST, SECOND, FIRST]
    assert remembered() == {FIRST: 3, SECOND: 2}


def test_what_wins_twice_is_remembered_however_busy_it_is(measured):
    """A quota of the processor, or threads that sleep while they wait, look as other work does."""
    assert measured(False, False, False, False, same=True) == [FIRST, SECOND, FIRST, SECOND]
    assert remembered() == {FIRST: 3, SECOND: 4}


def test_where_another_wins_each_time_it_holds_in_this_process_alone(measured):
    assert measured(False, True, False) == [FIRST, SECOND, FIRST]
    assert remembered() == {SECOND: 2}


def test_where_that_is_so_of_all_nothing_is_written(measured, cache):
    assert measured(False, False, False, False) == [FIRST, SECOND, FIRST, SECOND]
    assert not cache.exists() and not remembered()


def test_the_budget_counts_for_the_second_time_too(measured, monkeypatch):
    now = iter([0, 1, 2, 10])
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: next(now))
    assert measured(False, True, budget_s=5) == [FIRST, SECOND]
    assert remembered() == {SECOND: 2}


@pytest.mark.parametrize(("seconds", "running", "quiet"), [(10, 9.9, True), (10, 5, False), (0, 0, True)])
def test_a_thread_that_waits_is_disturbed(seconds, running, quiet, monkeypatch):
    for name, *moments in (("perf_counter", 5, 5 + seconds), ("thread_time", 2, 2 + running)):
        monkeypatch.setattr(_measure.time, name, iter(moments).__next__)
    assert REAL_CHECK()() == quiet
