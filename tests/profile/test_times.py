"""Times of layers, of what lies between them and of autograd's nodes, by a clock that the layers move."""

import pytest
import torch
from torch import Tensor, nn

import segfast
from segfast._profile import passes, spans, timed
from segfast._profile.rows import Profile


class Clock:
    """Stands in for the module `time`: it goes on only where `take` says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds

    def __deepcopy__(self, memo: object) -> "Clock":
        return self  # there is one, also where attributes of a model are copied


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock by which three passes of each kind are timed."""
    clock = Clock()
    monkeypatch.setattr(passes, "time", clock)
    monkeypatch.setattr(timed, "_MOST_ROUNDS", 3)
    return clock


class _Takes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.seconds = clock, backward
        clock.take(forward)
        return x + 0

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.take(ctx.seconds)
        return gradient + 0, None, None, None


class Takes(nn.Module):
    """A layer that takes so many seconds."""

    def __init__(self, clock: Clock, forward: float, backward: float = 0.0) -> None:
        super().__init__()
        self.clock, self.seconds = clock, (forward, backward)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return _Takes.apply(x * self.scale, self.clock, *self.seconds)


class Net(nn.Module):
    """Two layers, one of them in a container, and time that passes between them."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.first = Takes(clock, 3.0, 5.0)
        self.inner = nn.Sequential(Takes(clock, 7.0, 11.0), nn.Identity())
        self.between = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.clock.take(self.between)
        x = self.inner(x)
        self.clock.take(0.01)
        return x


def profiled(model: nn.Module, **options) -> Profile:
    options = {"seconds": 0.01, "budget": 0, "progress": False, **options}
    return segfast.profile(model, torch.ones(2, 3), **options)


def times(found: Profile) -> list[tuple[str, str, str, float]]:
    return [(row.name, row.kind, row.direction, round(1e-6 * row.us, 6)) for row in found.rows]


def test_each_layer_and_what_lies_between(clock):
    found = profiled(Net(clock))
    assert times(found) == [
        ("first", "other", "forward", 3.0),
        ("", "between layers", "forward", 2.0),
        ("inner.0", "other", "forward", 7.0),
        ("inner.1", "other", "forward", 0.0),
        # Too little for a row of its own.
        ("", "between layers", "forward", 0.01),
    ]
    assert found.whole_us == found.plain_us == pytest.approx(12.01e6)
    assert sum(row.us for row in found.rows) == pytest.approx(found.whole_us)
    assert [1e-6 * row.start_us for row in found.rows] == pytest.approx([0.0, 3.0, 5.0, 12.0, 12.01])


def test_a_gap_is_of_the_module_that_leaves_it(clock):
    outer = nn.Sequential(nn.Sequential(Net(clock)))
    outer[0][0].first, outer[0][0].inner = nn.Sequential(Takes(clock, 1.0)), nn.Sequential(Takes(clock, 1.0))
    gaps = [row.name for row in profiled(outer).rows if row.kind == "between layers"]
    assert gaps == ["0.0", ""]


def test_backward_by_the_layers_that_the_nodes_are_of(clock):
    found = profiled(Net(clock), train=True)
    backward = [row for row in times(found) if row[2] == "backward" and row[1] != "between layers"]
    assert backward == [("inner.0", "other", "backward", 11.0), ("first", "other", "backward", 5.0)]
    assert found.whole_us == pytest.approx(28.01e6)
    assert sum(row.us for row in found.rows) == pytest.approx(found.whole_us)


def test_medians_and_percentiles_over_the_passes(clock):
    class Slower(nn.Module):
        """Its calls take a second more each time."""

        seconds = 0.0

        def forward(self, x):
            self.seconds += 1
            clock.take(self.seconds)
            return x + 1

    found = profiled(nn.Sequential(Slower()))
    [row, rest] = found.rows
    assert row.p20_us < row.us < row.p80_us
    assert (row.us, rest.us) == (found.whole_us, 0)


def test_the_cost_of_watching_is_told(clock, monkeypatch):
    begin = spans.Watch.begin

    def slower(watch, key):
        clock.take(0.5)
        return begin(watch, key)

    monkeypatch.setattr(spans.Watch, "begin", slower)
    found = profiled(Net(clock))
    # The forward, the network, its container and three layers; the first is before the whole begins.
    assert found.whole_us - found.plain_us == pytest.approx(5 * 0.5e6)
    assert "slower" in str(found)


def samples(*us: float) -> timed.Samples:
    found = timed.Samples()
    for each in us:
        found.add(0.0, each)
    return found


def test_medians_that_miss_the_whole_leave_the_rest_between():
    times = timed.Times()
    times.whole[0].extend([100.0, 100.0, 100.0])
    near = [samples(60.0, 57.0, 60.0), samples(39.0, 39.0, 38.0)]
    assert times.rest(0, near)[1:] == (2.0, 1.0, 4.0)
    far = [samples(90.0, 5.0, 5.0), samples(5.0, 90.0, 5.0), samples(5.0, 5.0, 90.0)]
    assert times.rest(0, far)[1:] == (85.0, 0.0, 85.0)


def test_changing_calls_are_an_error(clock):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn, self.layer = 0, nn.ReLU()

        def forward(self, x):
            self.turn += 1
            for _ in range(self.turn):
                x = self.layer(x)
            return x

    with pytest.raises(ValueError, match="the model made other calls in one pass than in another"):
        profiled(Changing())
