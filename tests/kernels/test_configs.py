"""Which tiles a kernel runs with, what was measured, what is proven.

All of it pure, none of it with a GPU.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton

from segfast import kernels
from segfast.kernels import Config, _configs, _device
from segfast.kernels._configs import Problem

FORWARD = "conv_transpose2d_forward"
DEVICE = torch.device("cuda", 0)
CONFIG = Config(64, 32, 16, 4, 3)


def problem(
    operation=FORWARD, channels=64, taps=4, groups=1, dtype=torch.float16, pixels=4096, rows=4096, columns=256
):
    return Problem(operation, channels, columns // taps, taps, groups, dtype, pixels, rows, columns, channels)


def row(config=CONFIG, us=10.0, aten_us=20.0):
    return _configs.config_row(config, us, aten_us)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Committed tables and a user's cache in temporary folders, read as on a GPU `nvidia-test` of sm_90."""
    committed, cache = tmp_path / "configs", tmp_path / "cache"
    committed.mkdir(), cache.mkdir()
    monkeypatch.setattr(_configs, "_FOLDER", committed)
    monkeypatch.setenv("SEGFAST_CACHE", str(cache))
    monkeypatch.setattr(_device, "_query", lambda index: ("sm_90", "nvidia-test", 232448))
    monkeypatch.setattr(_configs, "_warn_untuned", lambda operation, arch: None)
    _configs.forget_tables()

    def write(where, name, content):
        ((committed if where == "committed" else cache) / f"{name}.json").write_text(json.dumps(content))
        _configs.forget_tables()

    yield write
    monkeypatch.undo()
    _configs.forget_tables()


def table(rows, architecture="sm_90"):
    return {"architecture": architecture, "operations": {FORWARD: rows}}


def test_the_bucket_names_channels_taps_groups_dtype_and_log2_of_the_pixels():
    assert problem().bucket == "ci64-co64-t4-g1-float16-p12"
    assert problem(pixels=4095).bucket.endswith("-p11")
    assert problem(dtype=torch.bfloat16, groups=2).bucket == "ci64-co64-t4-g2-bfloat16-p12"
    assert [_configs.log2(n) for n in (0, 1, 2, 3, 4, 2**40)] == [0, 0, 1, 1, 2, 40]


def test_the_nearest_bucket_within_a_factor_of_four_is_taken(gpu):
    near, far = Config(16, 16, 16, 4, 2), Config(32, 32, 32, 4, 2)
    stem = "ci64-co64-t4-g1-float16-p"
    gpu("committed", "nvidia-test", table({f"{stem}10": row(near), f"{stem}16": row(far)}))
    expected = {9: near, 10: near, 12: near, 14: far, 18: far}
    for log2_pixels, config in expected.items():
        assert kernels.choose_config(problem(pixels=2**log2_pixels), DEVICE) == config, log2_pixels
    for log2_pixels in (7, 19):  # more than a factor of four away: the heuristic
        chosen = kernels.choose_config(problem(pixels=2**log2_pixels), DEVICE)
        assert chosen == kernels.candidates(problem(pixels=2**log2_pixels), "sm_90", 232448)[0]
        assert chosen not in (near, far)


@pytest.mark.parametrize("other", [{"channels": 32}, {"taps": 16}, {"groups": 2}, {"dtype": torch.float32}])
def test_another_problem_does_not_take_the_row(gpu, other):
    gpu("committed", "nvidia-test", table({problem().bucket: row()}))
    assert kernels.choose_config(problem(), DEVICE) == CONFIG
    assert kernels.choose_config(problem(**other), DEVICE) != CONFIG


def test_open_pixels_return_the_row_least_favourable_to_us(gpu):
    stem = "ci64-co64-t4-g1-float16-p"
    rows = {f"{stem}{i}": row(us=us, aten_us=100.0) for i, us in ((8, 50.0), (12, 130.0), (16, 90.0))}
    gpu("committed", "nvidia-test", table(rows))
    assert _configs.measured(FORWARD, stem, "nvidia-test", "sm_90")["us"] == 130.0
    assert _configs.measured(FORWARD, "ci64-co64-t9-g1-float16-p", "nvidia-test", "sm_90") is None


def test_the_users_cache_comes_before_committed_tables_and_those_of_the_same_architecture(gpu):
    mine, committed, sibling, foreign = (Config(16, 16, 16, 4, n) for n in (2, 3, 4, 5))
    bucket = problem().bucket
    gpu("committed", "nvidia-elder", table({bucket: row(foreign)}, "sm_80"))
    heuristic = kernels.candidates(problem(), "sm_90", 232448)[0]
    assert kernels.choose_config(problem(), DEVICE) == heuristic
    gpu("committed", "nvidia-sibling", table({bucket: row(sibling)}))
    assert kernels.choose_config(problem(), DEVICE) == sibling
    gpu("committed", "nvidia-test", table({bucket: row(committed)}))
    assert kernels.choose_config(problem(), DEVICE) == committed
    gpu("cache", "nvidia-test", table({bucket: row(mine)}))
    assert kernels.choose_config(problem(), DEVICE) == mine


def test_a_measured_row_that_does_not_fit_the_device_is_passed_over(gpu, monkeypatch):
    huge = Config(128, 256, 128, 8, 4)  # 393216 bytes
    gpu("committed", "nvidia-test", table({problem().bucket: row(huge)}))
    assert kernels.choose_config(problem(), DEVICE).shared_memory(2) <= 232448


def test_an_unreadable_table_is_said_and_ignored(gpu, tmp_path):
    (tmp_path / "cache" / "nvidia-test.json").write_text("{ not json")
    _configs.forget_tables()
    with pytest.warns(UserWarning, match=r"nvidia-test\.json"):
        assert kernels.choose_config(problem(), DEVICE) == kernels.candidates(problem(), "sm_90", 232448)[0]


@pytest.mark.parametrize("operation", _configs.operations())
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
    gpu("committed", "nvidia-test", table({problem().bucket: row()}))
    first, second = Config(16, 16, 16, 4, 2), Config(32, 32, 32, 4, 2)
    with kernels.override_config(FORWARD, first):
        with pytest.raises(KeyError), kernels.override_config(FORWARD, second):
            assert kernels.choose_config(problem(), DEVICE) == second
            raise KeyError
        assert kernels.choose_config(problem(), DEVICE) == first
        other = problem("conv_transpose2d_grad_weight")
        assert kernels.choose_config(other, DEVICE) not in (first, second)
    assert kernels.choose_config(problem(), DEVICE) == CONFIG


def proof(operation=FORWARD, digest=None):
    digest = digest or _configs.source_digest(operation)
    return {"source": digest, "gpu": "nvidia-test", "triton": triton.__version__, "date": "2026-01-01"}


def test_proofs_are_committed_or_the_users_and_hold_for_their_architecture(gpu):
    gpu(
        "committed",
        "proven",
        {"sm_90": {f"{FORWARD}.float16": proof()}, "sm_80": {f"{FORWARD}.float32": proof()}},
    )
    gpu("cache", "proven", {"sm_90": {f"{FORWARD}.bfloat16": proof()}})
    proven = [
        d for d in (torch.float16, torch.bfloat16, torch.float32) if _configs.proven(FORWARD, d, DEVICE)
    ]
    assert proven == [torch.float16, torch.bfloat16]
    assert not _configs.proven("conv_transpose2d_grad_input", torch.float16, DEVICE)


def test_a_proof_of_other_device_code_does_not_count(gpu):
    gpu(
        "committed",
        "proven",
        {"sm_90": {f"{FORWARD}.float16": proof(digest="0" * 16), "unknown.float16": proof()}},
    )
    assert _configs.proven_entries("sm_90") == frozenset()


def test_a_proof_counts_for_the_minor_version_of_triton_that_it_was_made_with(gpu):
    major, minor, *_ = map(int, triton.__version__.split(".")[:2])
    versions = {
        "float16": f"{major}.{minor}.99",
        "bfloat16": f"{major}.{minor + 1}.0",
        "float32": f"{major + 1}.{minor}.0",
    }
    proofs = {f"{FORWARD}.{dtype}": proof() | {"triton": version} for dtype, version in versions.items()}
    unnamed = {name: value for name, value in proof().items() if name != "triton"}
    gpu("committed", "proven", {"sm_90": proofs | {"conv_transpose2d_grad_input.float16": unnamed}})
    assert _configs.proven_entries("sm_90") == {f"{FORWARD}.float16"}


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        (FORWARD, "conv_transpose2d/forward.py"),
        *((FORWARD, f"_{name}.py") for name in ("epilogue", "fold", "launch", "operands", "reduce")),
        # Launches of another family's kernels.
        ("conv_transpose2d_grad_input", "dilated_conv2d/dense.py"),
        ("conv2d_grad_input", "conv_transpose2d/forward.py"),
        ("conv2d_grad_weight", "dilated_conv2d/grad_weight.py"),
        ("pointwise_conv2d_forward", "dilated_conv2d/dense.py"),
    ],
)
def test_the_digest_follows_the_device_code(operation, path, monkeypatch, tmp_path):
    copy = shutil.copytree(Path(_configs.__file__).parent, tmp_path / "kernels")
    monkeypatch.setattr(_configs, "__file__", str(copy / "_configs.py"))
    digest = _configs.source_digest.__wrapped__
    assert digest(operation) == _configs.source_digest(operation)
    (copy / "configs" / "nvidia-test.json").write_text("{}")
    assert digest(operation) == _configs.source_digest(operation)
    (copy / path).write_text((copy / path).read_text() + "\n# changed\n")
    assert digest(operation) != _configs.source_digest(operation)


def test_a_row_keeps_the_whole_configuration():
    given = Config(128, 64, 32, 8, 4, 6)
    written = json.loads(json.dumps(_configs.config_row(given, 1.23456, 7.0)))
    assert Config(**written["config"]) == given and asdict(given) == written["config"]
    assert (written["us"], written["aten_us"]) == (1.235, 7.0)
