"""The tile a kernel runs with: one measured near the problem, else the heuristic's.

All of it pure, none of it with a GPU.
"""

import shutil
from pathlib import Path

import pytest
import torch

from segfast import kernels
from segfast.kernels import Tile, _device, _tiles
from segfast.kernels._tiles import Problem

FORWARD = "conv_transpose2d_forward"
DEVICE = torch.device("cuda", 0)
TILE = Tile(64, 32, 16, 4, 3)


def problem(
    operation=FORWARD, channels=64, taps=4, groups=1, dtype=torch.float16, pixels=4096, rows=4096, columns=256
):
    return Problem(operation, channels, columns // taps, taps, groups, dtype, pixels, rows, columns, channels)


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(bucket, tile)` keeps what was measured on a GPU `nvidia-test` of sm_90."""
    monkeypatch.setattr(_device, "_query", lambda index: ("sm_90", "nvidia-test", 232448))
    kernels.forget_tiles()
    yield lambda bucket, tile: kernels.keep_tile("nvidia-test", FORWARD, bucket, tile)
    kernels.forget_tiles()


def test_the_bucket_names_channels_taps_groups_dtype_and_log2_of_the_pixels():
    assert problem().bucket == "ci64-co64-t4-g1-float16-p12"
    assert problem(pixels=4095).bucket.endswith("-p11")
    assert problem(dtype=torch.bfloat16, groups=2).bucket == "ci64-co64-t4-g2-bfloat16-p12"
    assert [_tiles.log2(n) for n in (0, 1, 2, 3, 4, 2**40)] == [0, 0, 1, 1, 2, 40]


def test_the_nearest_bucket_within_a_factor_of_four_is_taken(gpu):
    near, far = Tile(16, 16, 16, 4, 2), Tile(32, 32, 32, 4, 2)
    stem = "ci64-co64-t4-g1-float16-p"
    gpu(f"{stem}10", near)
    gpu(f"{stem}16", far)
    expected = {9: near, 10: near, 12: near, 14: far, 18: far}
    for log2_pixels, tile in expected.items():
        assert kernels.choose_tile(problem(pixels=2**log2_pixels), DEVICE) == tile, log2_pixels
    for log2_pixels in (7, 19):  # more than a factor of four away: the heuristic
        chosen = kernels.choose_tile(problem(pixels=2**log2_pixels), DEVICE)
        assert chosen == kernels.candidates(problem(pixels=2**log2_pixels), "sm_90", 232448)[0]
        assert chosen not in (near, far)


@pytest.mark.parametrize("other", [{"channels": 32}, {"taps": 16}, {"groups": 2}, {"dtype": torch.float32}])
def test_another_problem_does_not_take_it(gpu, other):
    gpu(problem().bucket, TILE)
    assert kernels.choose_tile(problem(), DEVICE) == TILE
    assert kernels.choose_tile(problem(**other), DEVICE) != TILE


def test_each_gpu_and_operation_has_its_own(gpu, monkeypatch):
    gpu(problem().bucket, TILE)
    other = problem("conv_transpose2d_grad_input")
    assert kernels.choose_tile(other, DEVICE) == kernels.candidates(other, "sm_90", 232448)[0]
    monkeypatch.setattr(_device, "_query", lambda index: ("sm_90", "nvidia-other", 232448))
    assert kernels.choose_tile(problem(), DEVICE) != TILE


def test_the_newest_counts_until_it_is_forgotten(gpu):
    heuristic = kernels.choose_tile(problem(), DEVICE)
    for tile in (Tile(16, 16, 16, 4, 2), TILE):
        gpu(problem().bucket, tile)
        assert kernels.choose_tile(problem(), DEVICE) == tile
    kernels.forget_tiles()
    assert kernels.choose_tile(problem(), DEVICE) == heuristic != TILE


def test_without_a_gpu_nothing_that_was_measured_counts(gpu):
    gpu(problem().bucket, TILE)
    cpu = torch.device("cpu")
    assert kernels.choose_tile(problem(), cpu) != TILE


def test_what_was_measured_and_does_not_fit_the_device_is_passed_over(gpu):
    huge = Tile(128, 256, 128, 8, 4)  # 393216 bytes
    gpu(problem().bucket, huge)
    assert kernels.choose_tile(problem(), DEVICE).shared_memory(2) <= 232448


def test_problems_are_recorded_as_they_are_asked_for(gpu):
    gpu(problem().bucket, TILE)
    with kernels.record_problems() as outer:
        kernels.choose_tile(problem(), DEVICE)
        with kernels.record_problems() as inner, kernels.override_tile(FORWARD, TILE):
            kernels.choose_tile(problem(taps=9), DEVICE)
        kernels.choose_tile(problem(groups=2), DEVICE)
    kernels.choose_tile(problem(), DEVICE)
    assert outer == [problem(), problem(groups=2)] and inner == [problem(taps=9)]


@pytest.mark.parametrize("operation", _tiles.operations())
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_fits_the_shared_memory_of_its_architecture(operation, arch, dtype):
    limit = _device._SHARED_MEMORY[arch]
    for channels, columns, pixels in ((1, 16, 1), (21, 5376, 400), (64, 256, 2**18), (2048, 8192, 2**20)):
        given = problem(operation, channels, 16, dtype=dtype, pixels=pixels, rows=pixels, columns=columns)
        found = kernels.candidates(given, arch, limit)
        assert found and all(c.shared_memory(dtype.itemsize) <= limit for c in found)
        assert len(set(found)) == len(found)
        for c in found:
            if c.form == "two kernels":  # whose tiles are those of other operations
                continue
            sizes = (c.block_m, c.block_n, c.block_k)
            if operation.startswith(("gaussian", "mean_field")):  # where not all of these are a tile's sides
                sizes = (c.block_m,)
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
            if operation.startswith(("conv_transpose2d", "pointwise", "separable")):
                assert min(sizes) >= 16  # the smallest dot


def test_sm_86_gets_fewer_stages_where_sm_90_keeps_them():
    given = problem(channels=256, columns=1024, rows=2**16, pixels=2**16)
    roomy, tight = (
        kernels.candidates(given, "sm_90", _device._SHARED_MEMORY[arch]) for arch in ("sm_90", "sm_86")
    )
    assert max(c.shared_memory(2) for c in roomy) > 101376 >= max(c.shared_memory(2) for c in tight)


def test_pretending_an_architecture_holds_inside_the_block_only():
    cpu = torch.device("cpu")
    with kernels.pretend_architecture("sm_86"):
        assert kernels.architecture(cpu) == "sm_86"
        assert _device.shared_memory_limit(cpu) == 101376
        with kernels.pretend_architecture("gfx942"):
            assert kernels.architecture(cpu) == "gfx942"
        assert kernels.architecture(cpu) == "sm_86"
    assert kernels.architecture(cpu) == "cpu"


def test_an_override_wins_nests_and_is_undone_even_by_an_error(gpu):
    gpu(problem().bucket, TILE)
    first, second = Tile(16, 16, 16, 4, 2), Tile(32, 32, 32, 4, 2)
    with kernels.override_tile(FORWARD, first):
        with pytest.raises(KeyError), kernels.override_tile(FORWARD, second):
            assert kernels.choose_tile(problem(), DEVICE) == second
            raise KeyError
        assert kernels.choose_tile(problem(), DEVICE) == first
        other = problem("conv_transpose2d_grad_weight")
        assert kernels.choose_tile(other, DEVICE) not in (first, second)
    assert kernels.choose_tile(problem(), DEVICE) == TILE


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        (FORWARD, "conv_transpose2d/forward.py"),
        *((FORWARD, f"_{name}.py") for name in ("epilogue", "fold", "launch", "split", "tf32")),
        # Launches of another family's kernels.
        ("conv_transpose2d_grad_input", "conv2d/dense.py"),
        ("conv2d_grad_input", "conv_transpose2d/forward.py"),
        ("conv2d_grad_weight", "conv2d/grad_weight.py"),
        ("pointwise_conv2d_forward", "conv2d/dense.py"),
    ],
)
def test_the_digest_follows_the_device_code(operation, path, monkeypatch, tmp_path):
    copy = shutil.copytree(Path(_tiles.__file__).parent, tmp_path / "kernels")
    monkeypatch.setattr(_tiles, "__file__", str(copy / "_tiles.py"))
    digest = _tiles.source_digest.__wrapped__
    assert digest(operation) == _tiles.source_digest(operation)
    (copy / "_device.py").write_text("# which asks the device, and is not in it")
    assert digest(operation) == _tiles.source_digest(operation)
    (copy / path).write_text((copy / path).read_text() + "\n# changed\n")
    assert digest(operation) != _tiles.source_digest(operation)


def test_the_whole_digest_follows_every_file(monkeypatch, tmp_path):
    copy = shutil.copytree(Path(_tiles.__file__).parent, tmp_path / "kernels")
    monkeypatch.setattr(_tiles, "__file__", str(copy / "_tiles.py"))
    digest = _tiles.whole_digest.__wrapped__
    seen = {digest()}
    assert seen == {kernels.whole_digest()}
    for path in ("_device.py", "conv_transpose2d/forward.py", "dense_crf/__init__.py"):
        (copy / path).write_text((copy / path).read_text() + "\n# changed\n")
        assert digest() not in seen
        seen.add(digest())
