"""Shared by all tests: what needs Triton's interpreter, and what it would not notice by itself."""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"

# More threads than one only fight on a small machine that runs something else beside.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "interpreter: runs Triton kernels on CPU tensors; needs TRITON_INTERPRET=1 set before the start",
    )
    config.addinivalue_line(
        "markers", "compat: part of the sample of every family that `make compat` runs under other versions"
    )
    config.addinivalue_line("markers", "measures: chooses by times, of a clock that the test makes")
    config.addinivalue_line(
        "markers", "device: runs Triton kernels on a CUDA device, a real one or that of `make simulate`"
    )


def pytest_collection_modifyitems(config, items):
    """Each test runs in one of two sessions: with Triton's interpreter, or without it."""
    for item in items:
        if ("interpreter" in item.keywords) != INTERPRETING:
            wanted = "TRITON_INTERPRET=1" if not INTERPRETING else "TRITON_INTERPRET unset"
            item.add_marker(pytest.mark.skip(reason=f"runs in the session with {wanted}"))
        elif "device" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here; `make simulate` pretends one"))


@pytest.fixture(autouse=True)
def no_choices(request, monkeypatch):
    """`optimize` times nothing and each call is ATen's, but in tests marked `measures`; it is quiet."""
    from segfast._optimize import measure
    from segfast.ops import _measure

    monkeypatch.setattr(_measure, "quiet_check", lambda: lambda: True)

    if "measures" not in request.keywords:
        monkeypatch.setattr(measure, "MEASURES", False)


@pytest.fixture(autouse=INTERPRETING, scope="session")
def boolean_masks():
    """Holds every mask to booleans: Triton 3.9's interpreter takes no integers, those before do."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    def watch(name, place):
        access = getattr(InterpreterBuilder, name)

        def watched(builder, *arguments):
            assert arguments[place].data.dtype == np.bool_, f"{name}: a mask of {arguments[place].data.dtype}"
            return access(builder, *arguments)

        patch.setattr(InterpreterBuilder, name, watched)

    with pytest.MonkeyPatch.context() as patch:
        watch("create_masked_load", 1)
        watch("create_masked_store", 2)
        yield


@pytest.fixture
def fused_at_any_size(monkeypatch):
    """On a CPU small images are computed layer by layer, but in a test that asks for this."""
    from segfast.nn._fused import eager

    monkeypatch.setattr(eager, "_LEAST_ELEMENTS", 0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty filled with NaN, so that an output the kernels leave unwritten shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        result = empty(*args, **kwargs)
        if result.is_floating_point() and result.device.type != "meta":
            result.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def checked_hints(monkeypatch):
    """Holds every `tl.multiple_of` to its word.

    A broken one is a misaligned access on a GPU. Returns the words.
    """
    from triton.runtime.interpreter import TensorHandle

    given = []

    def set_attr(handle, name, value):
        if name == "tt.divisibility":
            for divisor in value if isinstance(value, list) else [value]:
                divisor = getattr(divisor, "value", divisor)
                given.append(divisor)
                assert (handle.data % divisor == 0).all(), (
                    f"not multiples of {divisor}: {handle.data.ravel()[:8]}"
                )

    monkeypatch.setattr(TensorHandle, "set_attr", set_attr)
    return given


@pytest.fixture
def checked_launches(monkeypatch):
    """Holds every kept launch to pointers of one kind.

    On a GPU a launch launches the machine code of its first call, which has the dtypes, the alignment and the
    absence of its pointers built in.
    """
    from segfast.kernels._launch import Launch

    original, first = Launch._launch, {}

    def checked(launch, pointers, index):
        kind = [None if p is None else (p.dtype, p.data_ptr() % 16 == 0) for p in pointers]
        _, expected = first.setdefault(id(launch), (launch, kind))
        assert kind == expected, f"{launch.kernel.__name__}: pointers {kind}, compiled for {expected}"
        return original(launch, pointers, index)

    monkeypatch.setattr(Launch, "_launch", checked)


@pytest.fixture
def checked_addresses(monkeypatch):
    """Holds every load and store to the tensors of its launch: the interpreter reads past them unnoticed."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    from segfast.kernels._launch import Launch

    original, ranges = Launch._launch, []

    def checked(launch, pointers, index):
        storages = [p.untyped_storage() for p in pointers if p is not None]
        ranges[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return original(launch, pointers, index)

    def watch(name):
        access = getattr(InterpreterBuilder, name)

        def watched(builder, pointers, *arguments):
            mask = arguments[0 if name == "create_masked_load" else 1].data
            addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
            inside = [(addresses >= low) & (addresses < high) for low, high in ranges]
            assert np.logical_or.reduce(inside).all(), f"{name} at {addresses} of {ranges}"
            return access(builder, pointers, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    monkeypatch.setattr(Launch, "_launch", checked)
    # Those without a mask come here too.
    watch("create_masked_load")
    watch("create_masked_store")


@pytest.fixture
def small_tiles():
    """Depthwise and separable tiles for the interpreter: an empty row takes it as long as a full one."""
    if not INTERPRETING:
        yield
        return
    from .separable_conv2d.reference import in_form, tiles

    with tiles(4, 8, 8, 2), in_form("fused"):
        yield


def is_taken(file) -> bool:
    """True if somebody has the turn to write `file`, so that another process would wait."""
    import fcntl

    with open(file.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture
def pretended_gpu(monkeypatch, cache, tmp_path):
    """An H200 as torch describes it, where there is none, of which nothing is known; its name in files."""
    import types

    from segfast.kernels import _device
    from segfast.ops import _backend, _choice_files, _gpu

    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_device, "_query", lambda index: ("sm_90", "nvidia-h200", 232448))
    monkeypatch.setattr(_backend, "_gpu_reasons", {0: None})
    monkeypatch.setattr(_choice_files, "_BROUGHT", tmp_path / "brought")
    monkeypatch.setattr(_gpu, "_names", {})
    return "nvidia-h200"


@pytest.fixture
def wins(monkeypatch, cache):
    """`wins(name)`: this candidate takes the least wherever it serves and is right."""

    def set_winner(winner: str) -> None:
        def times(runs, input):
            return {name: 1e3 if name == winner else 2e3 for name in runs}

        from segfast.ops import _measure

        monkeypatch.setattr(_measure, "_times", times)

    return set_winner


@pytest.fixture
def model_takes(monkeypatch):
    """`model_takes(as_given, channels_last, after)`: milliseconds that whole models take."""

    def set_times(*ms: float) -> None:
        from segfast._optimize import gain as gains
        from segfast._timing import Timing

        def interleave(runs, device, **kwargs):
            nan = float("nan")
            return {
                name: Timing(nan, nan, nan, 1e3 * t, 1e3 * t, 1e3 * t, 3)
                for name, t in zip(runs, ms, strict=True)
            }

        monkeypatch.setattr(gains, "interleave", interleave)
        monkeypatch.setattr(gains, "_SLOW_S", float("inf"))  # what a first run took is not enough

    return set_times
