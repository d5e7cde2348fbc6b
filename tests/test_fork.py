"""Processes that are forked after torch has used its threads: they return."""

import multiprocessing
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
LONG = 300  # seconds after which something hangs

# The parent's threads are at work before it forks, and are needed by what a child computes.
PARENT = """
import multiprocessing
import numpy as np
import torch

def crf(_=None):
    import segfast.crf
    d = segfast.crf.DenseCRF2D(90, 80, 3)
    d.setUnaryEnergy(np.random.rand(3, 7200).astype(np.float32))
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=40, srgb=13, rgbim=np.zeros((80, 90, 3), np.uint8), compat=10)
    return d.inference(3).shape == (3, 7200)

def mean_field(_=None):
    import segfast
    q = segfast.functional.mean_field(torch.rand(2, 3, 80, 90), 255 * torch.rand(2, 3, 80, 90))
    return q.shape == (2, 3, 80, 90)

def head(_=None):
    import segfast
    logits, target = torch.randn(2, 5, 40, 40), torch.randint(5, (2, 320, 320))
    loss = segfast.functional.upsample_cross_entropy(logits.requires_grad_(), target, scale_factor=8)
    loss.backward()
    labels = segfast.functional.upsample_argmax(logits.detach(), scale_factor=8)
    return bool(logits.grad.isfinite().all()) and labels.shape == target.shape

def predict(_=None):
    import segfast
    with torch.no_grad():
        mask = segfast.models.SelfieSegmenter().eval()(torch.rand(1, 3, 256, 256))
    return mask.shape[-1] == 256

class Images(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return self.transform(i)

def convolve():
    torch.set_num_threads(2)
    torch.nn.functional.conv2d(torch.rand(4, 32, 200, 200), torch.rand(32, 32, 3, 3))
    torch.rand(1000, 1000) @ torch.rand(1000, 1000)
    torch.rand(10**7).exp()
"""


def run(script):
    """The lines that the script prints, behind the definitions above."""
    code = PARENT + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * LONG)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("function", ["crf", "mean_field", "head", "predict"])
@pytest.mark.parametrize("imported", ["before the fork", "after it", "after it, by the default context"])
def test_a_pool_s_workers_return(function, imported):
    found = run(f"""
        {"import segfast" if imported == "before the fork" else ""}
        multiprocessing.set_start_method("fork")
        convolve()
        context = multiprocessing if "default" in "{imported}" else multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            print(*pool.map_async({function}, range(3)).get({LONG}), torch.get_num_threads())
    """)
    assert found == ["True"] * 3 + ["2"]


@pytest.mark.parametrize("function", ["crf", "mean_field", "head", "predict"])
def test_a_data_loader_s_workers_return(function):
    found = run(f"""
        import segfast
        convolve()
        {function}()
        data = Images({function})
        options = dict(num_workers=2, multiprocessing_context="fork", timeout={LONG})
        print(*[bool(item.all()) for item in torch.utils.data.DataLoader(data, **options)])
    """)
    assert found == ["True"] * 4


def test_a_process_that_is_forked_in_between_and_again_returns():
    """After the dense CRF has had threads of its own, and inside of a block that has torch on one thread."""
    found = run(f"""
        import os, sys
        import segfast
        from segfast.commands._threads import one_thread
        convolve()
        assert mean_field()

        def grandchild(_):
            with multiprocessing.get_context("fork").Pool(1) as pool:
                return crf() and pool.map_async(mean_field, range(2)).get({LONG}) == [True, True]

        from concurrent.futures import ProcessPoolExecutor
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            print(pool.submit(grandchild, 0).result({LONG}), flush=True)
        with one_thread():
            child = os.fork()
        if child == 0:
            # Left the block: the parent's number of threads is not the child's.
            print(mean_field(), torch.get_num_threads(), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(torch.get_num_threads())
    """)
    assert found == ["True", "True", "1", "2"]


def test_a_child_s_threads_are_its_own():
    """Threads that a child asks for are new ones, and not those that its parent had."""
    found = run(f"""
        import segfast

        def several(_):
            torch.set_num_threads(3)
            from segfast.ops import _threads as threads
            done = []
            threads.on_threads(torch.empty(0), lambda: threads.each([lambda: done.append(1)] * 20))
            return len(done)

        torch.set_num_threads(3)
        mean_field()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(*pool.map_async(several, range(2)).get({LONG}))
    """)
    assert found == ["20", "20"]


def test_processes_that_are_not_forked_keep_their_threads(tmp_path):
    (tmp_path / "work.py").write_text(
        "import torch\n\n"
        "def kept(_):\n"
        "    torch.set_num_threads(3)\n"
        "    import segfast\n"
        "    return torch.get_num_threads()\n"
    )
    found = run(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import work
        if __name__ == "__main__":
            for method in ("spawn", "forkserver"):
                with multiprocessing.get_context(method).Pool(1) as pool:
                    print(*pool.map_async(work.kept, range(2)).get({LONG}))
    """)
    assert found == ["3"] * 4
