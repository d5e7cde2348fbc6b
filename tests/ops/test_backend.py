"""The backend that runs: by name, under "auto" on a GPU that is not there, by thread, by environment."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import parallel_apply

import segfast
from segfast.ops import _backend
from segfast.ops._gpu import can_use_triton

X, W = torch.randn(1, 8, 4, 4), torch.randn(8, 4, 2, 2)


def up(**options):
    return segfast.functional.conv_transpose2d(X, W, stride=2, **options)


def test_auto_is_the_default_and_takes_aten_on_a_cpu():
    assert segfast.get_backend() == "auto"
    (explanation,) = segfast.explain(up)
    assert (explanation.operation, explanation.backend) == ("conv_transpose2d", "aten")
    assert "CPU" in explanation.reason


def test_a_backend_set_at_once_is_restored_by_the_context_manager():
    choice = segfast.backend("aten")
    assert segfast.get_backend() == "aten"
    with segfast.backend("triton"):
        assert segfast.get_backend() == "triton"
    assert segfast.get_backend() == "aten"
    with pytest.raises(KeyError), segfast.backend("triton"):
        raise KeyError
    assert segfast.get_backend() == "aten"
    choice.__exit__()
    assert segfast.get_backend() == "auto"


def in_thread(function):
    """The result of `function` in a thread started now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_the_main_thread_s_choice_reaches_threads_started_inside_and_those_that_live_on():
    with ThreadPoolExecutor(1) as pool:  # as autograd's: one thread for good
        assert pool.submit(segfast.get_backend).result() == "auto"
        with segfast.backend("aten"):
            assert pool.submit(segfast.get_backend).result() == "aten"
            assert in_thread(segfast.get_backend) == "aten"
        assert pool.submit(segfast.get_backend).result() == "auto"


def test_another_thread_s_choice_is_its_own():
    def inside():
        with segfast.backend("triton"):
            return segfast.get_backend(), in_thread(segfast.get_backend)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(segfast.backend, "triton").result()
        assert segfast.get_backend() == "auto"
        with segfast.backend("aten"):
            assert pool.submit(segfast.get_backend).result() == "triton"
            assert in_thread(inside) == ("triton", "aten")
            assert in_thread(lambda: inside() and segfast.get_backend()) == "aten"


def replicas(call):
    """`call`, twice at once, in the threads that torch.nn.DataParallel starts for its replicas."""
    fakes = {
        "current_stream": lambda device=None: contextlib.nullcontext(),
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("cpu"),
        "device_index": lambda device: contextlib.nullcontext(),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.accelerator, name, fake)
        return parallel_apply([call, call], [(X,), (X,)])


def test_replicas_of_data_parallel_follow_the_block_they_run_in():
    layer = segfast.nn.ConvTranspose2d(8, 4, 2, stride=2)
    with segfast.backend("aten"):
        explanations = segfast.explain(replicas, layer)
    assert [d.reason for d in explanations] == ["asked for by name"] * 2
    with segfast.backend("triton"), pytest.raises(NotImplementedError, match='backend "triton" cannot serve'):
        replicas(layer)
    assert [d.reason for d in segfast.explain(replicas, layer)] == ["the tensors are on a CPU"] * 2


def test_an_operator_that_is_given_its_backend_changes_no_other_thread_s():
    with _backend.backend_of_this_thread("triton"):
        assert segfast.get_backend() == "triton" and in_thread(segfast.get_backend) == "auto"
    assert segfast.get_backend() == "auto"


def test_a_compiled_call_follows_the_backend():
    counter = CompileCounter()
    compiled = torch.compile(up, backend=counter, fullgraph=True)
    compiled()
    with segfast.backend("aten"):
        compiled()
    compiled()
    assert counter.frame_count == 2


def test_an_unknown_backend_lists_the_three():
    with pytest.raises(ValueError, match="'auto', 'triton', 'aten', got 'cudnn'"):
        segfast.backend("cudnn")
    assert segfast.get_backend() == "auto"


@pytest.mark.parametrize(("value", "code"), [("aten", 0), ("cudnn", 1)])
def test_the_environment_names_the_default(value, code):
    command = [sys.executable, "-c", "import segfast; print(segfast.get_backend())"]
    environment = {**os.environ, "SEGFAST_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == code
    if code:
        assert "SEGFAST_BACKEND must be one of 'auto', 'triton', 'aten', got 'cudnn'" in result.stderr
    else:
        assert result.stdout.strip() == "aten"


def test_triton_by_name_says_why_it_cannot():
    with (
        segfast.backend("triton"),
        pytest.raises(NotImplementedError, match='"triton" cannot serve this call: the tensors are on a CPU'),
    ):
        up()


class OnGPU:
    """A tensor on a GPU, as far as the predicates ask."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)
    shape = torch.Size((1, 64, 32, 32))

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype

    def numel(self):
        return self.shape.numel()


WEIGHT = torch.empty(64, 32, 2, 2)


def reason_not(choice, input=None, dtype=None, chosen=None):
    return can_use_triton(choice, input or OnGPU(), WEIGHT, dtype, "conv_transpose2d", chosen)


def test_auto_takes_what_was_chosen(pretended_gpu):
    assert reason_not("auto") == "not measured on this GPU"
    assert reason_not("auto", chosen="triton") is None
    assert reason_not("auto", chosen="aten") == "aten"
    assert reason_not("triton") is None  # by name it runs all the same


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32])
def test_dtypes_without_kernels_take_aten(pretended_gpu, dtype):
    for choice in ("triton", "auto"):
        assert "no kernels for" in reason_not(choice, OnGPU(dtype), chosen="triton")


def test_autocast_decides_the_dtype(pretended_gpu):
    double = OnGPU(torch.float64)
    assert reason_not("triton", double, torch.bfloat16) is None
    assert "no kernels for float64" in reason_not("triton", OnGPU(), torch.float64)


def test_old_gpus_and_empty_tensors_take_aten(pretended_gpu, monkeypatch):
    empty = OnGPU()
    empty.shape = torch.Size((0, 64, 32, 32))
    assert "empty" in reason_not("triton", empty) and "empty" in reason_not("auto", empty, chosen="triton")
    monkeypatch.setitem(_backend._gpu_reasons, 0, "the GPU's compute capability is below 8.0")
    assert "below 8.0" in reason_not("triton") and "below 8.0" in reason_not("auto", chosen="triton")


@pytest.mark.interpreter
def test_the_interpreter_runs_only_what_is_asked_for_by_name():
    assert segfast.explain(up)[0].backend == "aten"
    with segfast.backend("triton"):
        assert segfast.explain(up)[0].backend == "triton"
        with pytest.raises(NotImplementedError, match="bfloat16 wrongly"):
            segfast.functional.conv_transpose2d(X.bfloat16(), W.bfloat16())
        assert (
            segfast.explain(segfast.functional.up_concat, X, torch.randn(1, 3, 8, 8), W)[0].backend
            == "triton"
        )


@pytest.mark.interpreter
def test_the_backward_keeps_the_choice_of_the_forward():
    x = X.clone().requires_grad_()
    with segfast.backend("triton"):
        y = segfast.functional.conv_transpose2d(x, W, stride=2)
    assert type(y.grad_fn).__name__ == "_ForwardBackward"
    with segfast.backend("aten"):
        y.sum().backward()
    expected = torch.nn.functional.conv2d(torch.ones_like(y), W, stride=2)
    assert torch.allclose(x.grad, expected, atol=1e-5)
