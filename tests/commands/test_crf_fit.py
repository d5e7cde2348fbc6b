"""`segfast crf-fit`: it finds what helps, gives up where nothing does, and says which."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segfast._errors import UserError
from segfast.cli import main
from segfast.commands import _crf_search, crf_fit
from segfast.commands._crf_parameters import (
    NO_CRF,
    TEXTBOOK,
    Parameters,
    read_parameters,
    refine,
    write_parameters,
)
from segfast.commands._crf_search import Accuracy, Labeled, accuracy, search, split, verdict
from segfast.commands._train_data import nuclei_samples
from segfast.data import normalize, nuclei, read_colors
from segfast.functional import mean_field
from segfast.models import UNet
from segfast.train import save_checkpoint

SIZE = 24, 32


def noisy(seed: int, wrong: float = 0.3) -> Labeled:
    """A disc of another color than its background, and a network that guesses it pixel by pixel."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*(torch.arange(n) for n in SIZE), indexing="ij")
    target = ((y - 12).square() + (x - 14 - seed).square() < 60).long()
    image = 60 + 120 * target + 8 * torch.randn(3, *SIZE, generator=generator)
    flipped = torch.where(torch.rand(SIZE, generator=generator) < wrong, 1 - target, target)
    foreground = 0.2 + 0.6 * flipped
    return Labeled(torch.stack([1 - foreground, foreground]), image.clamp(0, 255).round(), target)


def fine() -> Labeled:
    """A network that is right about lines of one pixel, which the image does not show."""
    target = (torch.arange(SIZE[1]) % 2).expand(SIZE)
    foreground = 0.3 + 0.4 * target
    return Labeled(torch.stack([1 - foreground, foreground]), torch.full((3, *SIZE), 90.0), target)


def test_search_finds_what_helps_elsewhere_too():
    seen = []
    best, trials = search([noisy(0), noisy(1)], trials=30, on_trial=seen.append)
    assert trials == len(seen) == 30
    assert seen == sorted(seen) and seen[-1] == accuracy([noisy(0), noisy(1)], best)
    before, after = (accuracy([noisy(2)], parameters) for parameters in (NO_CRF, best))
    assert before.pixel_accuracy < 0.75 and after.pixel_accuracy > 0.95
    assert after.mean_iou > before.mean_iou + 0.3


def test_search_keeps_no_crf_where_nothing_is_better():
    """Nor does anything equal replace it: of a perfect network all gentle CRFs are."""
    perfect = noisy(0, wrong=0)
    assert accuracy([perfect], NO_CRF) == (1, 1)
    assert accuracy([perfect], Parameters(4, 2, 0.7, 0.1, 0.1, 1)) == (1, 1)
    assert search([perfect], trials=12)[0] == NO_CRF
    assert search([fine()], trials=12)[0] == NO_CRF


def test_accuracy_is_over_all_pixels_that_are_scored():
    probabilities = torch.tensor([[[0.9, 0.9, 0.1, 0.1]], [[0.1, 0.1, 0.9, 0.9]]])
    samples = [
        Labeled(probabilities, torch.zeros(1, 1, 4), torch.tensor([[0, 1, 1, 255]])),
        Labeled(probabilities[..., :1], torch.zeros(1, 1, 1), torch.tensor([[0]])),
    ]
    # Right: 0, 1, 0; class 0 has 2 of 3, class 1 has 1 of 2.
    assert accuracy(samples, NO_CRF) == pytest.approx(((2 / 3 + 1 / 2) / 2, 3 / 4))


def tried(monkeypatch, **options) -> list[Parameters]:
    found = []
    monkeypatch.setattr(
        _crf_search, "accuracy", lambda samples, p, method: found.append(p) or Accuracy(-p.theta_beta, 0)
    )
    search([], **options)
    monkeypatch.undo()
    return found


def test_search_is_seeded_and_within_its_budget(monkeypatch):
    first, again, other = (tried(monkeypatch, trials=60, seed=seed) for seed in (3, 3, 4))
    assert first == again and len(first) == len(set(first)) == 60
    assert first[:2] == other[:2] == [NO_CRF, TEXTBOOK] and not set(first[2:30]) & set(other[2:30])
    for name, (low, high) in _crf_search.RANGES.items():
        values = [getattr(p, name) for p in first[2:30] if getattr(p, name)]
        assert low <= min(values) < max(values) <= high
    weights = [(p.bilateral_weight, p.spatial_weight) for p in first[2:30]]
    assert any(w[0] == 0 for w in weights) and any(w[1] == 0 for w in weights) and (0, 0) not in weights
    # Steps along theta_beta, which alone counts here, lead down from the best of the random ones.
    assert min(p.theta_beta for p in first[30:]) < 0.5 * min(p.theta_beta for p in first[:30])
    assert tried(monkeypatch, trials=2) == [NO_CRF, TEXTBOOK]
    # A clock that ticks at each look: the first is at the start, each further one before a trial.
    monkeypatch.setattr(_crf_search, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    assert tried(monkeypatch, trials=50, seconds=4) == tried(monkeypatch, trials=60, seed=0)[:5]


def test_split_by_rows_or_by_images():
    [top], [bottom] = split([noisy(0)], 0.25)
    assert top.target.shape == (18, 32) and bottom.image.shape == (3, 6, 32)
    assert torch.equal(torch.cat([top.probabilities, bottom.probabilities], 1), noisy(0).probabilities)
    samples = [noisy(i)._replace(target=torch.tensor(i)) for i in range(8)]
    parts = [[[int(s.target) for s in part] for part in split(samples, 0.3, seed)] for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert [len(part) for part in parts[0]] == [6, 2] and sorted(parts[0][0] + parts[0][1]) == [*range(8)]
    assert [len(part) for part in split(samples[:2], 0.9)] == [1, 1]
    with pytest.raises(UserError, match="between 0 and 1"):
        split(samples, 1.0)
    with pytest.raises(UserError, match="24 rows high cannot be split"):
        split([noisy(0)], 0.99)


def test_verdict_goes_either_way():
    best = TEXTBOOK
    assert "raises the mean IoU by 1.00 points" in verdict(best, Accuracy(0.5, 1), Accuracy(0.51, 0))
    assert "LOWERS the mean IoU by 2.00 points" in verdict(best, Accuracy(0.5, 0), Accuracy(0.48, 1))
    assert "leaves the mean IoU as it is" in verdict(best, Accuracy(0.5, 0), Accuracy(0.5, 0))
    assert "better than none" in verdict(NO_CRF, Accuracy(0.5, 0), Accuracy(0.5, 0))


def test_refine_is_mean_field_and_without_a_crf_nothing():
    sample = noisy(0)
    certain = sample.probabilities.round()  # 0 and 1
    assert refine(certain, sample.image, NO_CRF) is certain
    parameters = Parameters(5, 13, 2, 1, 0.5, 3)
    expected = mean_field(
        -certain.clamp_min(1e-5).log(),
        sample.image,
        iterations=3,
        theta_alpha=5,
        theta_beta=13,
        theta_gamma=2,
        bilateral_weight=1,
        spatial_weight=0.5,
        method="exact",
    )
    assert torch.equal(refine(certain, sample.image, parameters, "exact"), expected)
    assert parameters.scaled(2) == (10, 13, 4, 1, 0.5, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three images with masks, and the probabilities of a network, in a working directory of their own."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        write(f"{i}", noisy(i))
    return tmp_path


def write(name: str, sample: Labeled) -> None:
    for part in ("images", "masks", "network"):
        Path("data", part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample.image.byte().movedim(0, -1).numpy()).save(f"data/images/{name}.png")
    Image.fromarray(sample.target.byte().numpy()).save(f"data/masks/{name}.png")
    np.save(f"data/network/{name}.npy", sample.probabilities.half().numpy())


ARRAYS = ["crf-fit", "--data", "data", "--probabilities", "data/network", "--trials", "12"]


def test_arrays_of_probabilities(folder, capsys):
    # One of them as the map of class 1, compressed.
    foreground = np.load("data/network/2.npy")[1]
    Path("data/network/2.npy").unlink()
    np.savez_compressed("data/network/2.npz", foreground)
    assert main([*ARRAYS, "--holdout", "0.34"]) == 0
    captured = capsys.readouterr()
    assert "12/12" in captured.err and "best mean IoU" in captured.err
    assert "On the held-out part the fitted CRF raises the mean IoU" in captured.out
    content = json.loads(Path("out/crf.json").read_text())
    parts = split([noisy(i) for i in range(3)], 0.34)
    parameters, method = read_parameters("out/crf.json", channels=3)
    assert method == "auto" and content["classes"] == 2 and content["trials"] == 12
    for part, (name, found) in zip(parts, content["accuracy"].items(), strict=True):
        for when, tried_ones in (("before", NO_CRF), ("after", parameters)):
            expected = accuracy(part, tried_ones)
            assert tuple(found[when].values()) == pytest.approx(expected, abs=1e-3), (name, when)
    # The table has them in percent, with the change.
    before, after = (content["accuracy"]["held out"][when]["mean_iou"] for when in ("before", "after"))
    row = next(line for line in captured.out.splitlines() if line.startswith("fitted CRF"))
    assert f"{100 * after:.2f} ({100 * (after - before):+.2f})" in row
    # What was written is what mean_field takes.
    sample = noisy(0)
    q = mean_field(-sample.probabilities.log(), sample.image, **content["parameters"])
    assert torch.equal(q, refine(sample.probabilities, sample.image, parameters))
    first = Path("out/crf.json").read_bytes()
    assert main([*ARRAYS, "--holdout", "0.34"]) == 0  # its own result may be replaced
    assert Path("out/crf.json").read_bytes() == first


def test_a_fall_on_the_held_out_part_is_told(folder, capsys):
    for i in range(3):
        for part, suffix in (("images", "png"), ("masks", "png"), ("network", "npy")):
            Path(f"data/{part}/{i}.{suffix}").unlink()
    # For fitting, where a CRF helps; for measuring, where it harms.
    write("both", Labeled(*(torch.cat(pair, -2) for pair in zip(noisy(0), fine(), strict=True))))
    assert main(ARRAYS) == 0
    output = capsys.readouterr().out
    assert re.search(r"fitted CRF\s+\S+ \(\+", output)
    assert re.search(r"LOWERS the mean IoU by \d+\.\d\d points", output)
    found = json.loads(Path("out/crf.json").read_text())["accuracy"]["held out"]
    assert found["before"]["mean_iou"] == 1 > found["after"]["mean_iou"]


def test_unseen_takes_the_right_of_the_images(folder, capsys):
    for i in range(3):
        sample = noisy(i, wrong=0)
        sample.probabilities[..., :20] = sample.probabilities[..., :20].flip(0)
        write(f"{i}", sample)
    assert main([*ARRAYS[:-1], "3", "--unseen", "0.375"]) == 0
    assert re.search(r"network alone\s+100.00\s+100.00\s+100.00\s+100.00", capsys.readouterr().out)
    assert main([*ARRAYS[:-1], "3", "--unseen", "0.5"]) == 0
    assert not re.search(r"network alone\s+100.00", capsys.readouterr().out)


def test_a_network_on_a_folder(folder, capsys):
    torch.manual_seed(0)
    save_checkpoint(UNet(3, 2, width=4, depth=1, norm="batch"), "unet.safetensors")
    assert main(["crf-fit", "--data", "data", "--checkpoint", "unet.safetensors", "--trials", "3"]) == 0
    captured = capsys.readouterr()
    assert "3/3" in captured.err and "network alone" in captured.out
    assert json.loads(Path("out/crf.json").read_text())["channels"] == 3


def test_the_nuclei_by_default(tmp_path, capsys, monkeypatch):
    """Fitted to what the network was not trained on, the upper half of it."""
    monkeypatch.chdir(tmp_path)
    trained, fitted = [], []

    def trained_model(samples, device):
        trained.extend(samples)
        return UNet(1, 2, width=4, depth=1).to(device)

    monkeypatch.setattr(crf_fit, "trained_model", trained_model)
    monkeypatch.setattr(
        crf_fit, "search", lambda part, *args, **options: fitted.extend(part) or (TEXTBOOK, 1)
    )
    assert main(["crf-fit", "--trials", "2", "-o", "out/nuclei.json"]) == 0
    assert [sample.target.shape for sample in trained] == [(512, 384)]
    [upper] = fitted
    assert torch.equal(upper.target, (nuclei()[1] > 0).long()[:256, 384:])
    assert torch.equal(upper.image, 255 * nuclei_samples()[1][0].image[:, :256])
    assert upper.probabilities.sum(0).allclose(torch.ones(()))
    parameters, _ = read_parameters("out/nuclei.json", channels=1)
    assert parameters == TEXTBOOK and "wrote out/nuclei.json" in capsys.readouterr().out
    assert main(["segment", "absent.png", "--crf", "out/nuclei.json"]) == 2
    assert "fitted to images with channels=1, these have 3" in capsys.readouterr().err


def test_a_file_of_the_user_stays_without_force(folder, capsys):
    Path("out").mkdir()
    Path("out/crf.json").write_text("{}")
    assert main(ARRAYS) == 2
    assert "out/crf.json: exists and is not a file that segfast wrote" in capsys.readouterr().err
    assert Path("out/crf.json").read_text() == "{}"
    assert main([*ARRAYS, "--trials", "2", "--force"]) == 0
    assert read_parameters("out/crf.json", 3) == (TEXTBOOK, "auto")


def test_mistakes_about_the_source(folder, capsys):
    for arguments, message in (
        (["--probabilities", "data/network"], "--probabilities needs --data"),
        (["--foreground"], "--foreground and --unseen need --data"),
        (["--data", "data"], "--data needs the network: --checkpoint or --probabilities"),
    ):
        assert main(["crf-fit", *arguments]) == 2
        assert message in capsys.readouterr().err
    save_checkpoint(UNet(3, 2, width=4, depth=1), "unet.safetensors")
    assert main(["crf-fit", "--checkpoint", "unet.safetensors"]) == 2
    assert "3 channels and 2 classes, the nuclei image has 1 and 2" in capsys.readouterr().err


HALF = np.full((2, *SIZE), 0.5, np.float32)
ARRAY_MISTAKES = {
    "different sizes, 24x32 and 24x31": HALF[..., 1:],
    "expected probabilities, which sum to 1, got -3 to 3": np.stack([HALF[0] + 2.5, HALF[0] - 3.5]),
    "expected probabilities, which sum to 1, got 0.6 to 0.6": HALF + 0.1,
    "expected probabilities, which sum to 1": np.full_like(HALF, np.nan),
    "3 classes, expected 2": np.full((3, *SIZE), 1 / 3),
    "1 classes, expected 2": np.ones((1, *SIZE)),
    "expected floating point, [classes, H, W] or [H, W], got uint8 [2, 24, 32]": HALF.astype(np.uint8),
    "expected floating point, [classes, H, W] or [H, W], got float32 [1, 2, 24, 32]": HALF[None],
    "not a readable array": np.array([{}]),
}


@pytest.mark.parametrize("message", ARRAY_MISTAKES)
def test_arrays_that_are_no_probabilities(folder, capsys, message):
    np.save("data/network/1.npy", ARRAY_MISTAKES[message])
    if "1 classes" in message:
        np.save("data/network/0.npy", ARRAY_MISTAKES[message])
    assert main(ARRAYS) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert ".npy" in error and message in error


def test_an_image_of_another_size_than_its_mask(folder, capsys):
    Image.fromarray(np.zeros((24, 31, 3), np.uint8)).save("data/images/1.png")
    assert main(ARRAYS) == 2
    assert "1.png and data/images/1.png: different sizes, 24x32 and 24x31" in capsys.readouterr().err


def test_arrays_that_are_missing_or_too_many(folder, capsys):
    np.savez("data/network/1.npz", a=HALF, b=HALF)
    Path("data/network/1.npy").unlink()
    assert main(ARRAYS) == 2
    assert "1.npz: expected one array, the file has ['a', 'b']" in capsys.readouterr().err
    Path("data/network/1.npz").write_bytes(Path("data/network/1.npz").read_bytes()[:200])
    assert main(ARRAYS) == 2
    assert "1.npz: not a readable array" in capsys.readouterr().err
    Path("data/network/1.npz").unlink()
    assert main(ARRAYS) == 2
    assert "1.png: no probabilities named 1.npy or .npz in data/network" in capsys.readouterr().err


def test_masks_that_do_not_fit(folder, capsys):
    Image.fromarray(np.full(SIZE, 2, np.uint8)).save("data/masks/0.png")
    assert main(ARRAYS) == 2
    assert "0.png: class 2, the network knows 0 to 1" in capsys.readouterr().err
    for i in range(3):
        Image.fromarray(np.full(SIZE, 3, np.uint8)).save(f"data/masks/{i}.png")
    assert main([*ARRAYS, "--foreground", "--trials", "2"]) == 0


def test_masks_without_a_pixel_to_score(folder, capsys):
    for part, suffix in (("images", "png"), ("masks", "png"), ("network", "npy")):
        for i in range(2):
            Path(f"data/{part}/{i}.{suffix}").unlink()
    mask = np.ones(SIZE, np.uint8)
    mask[:12] = 255
    Image.fromarray(mask).save("data/masks/2.png")
    assert main(ARRAYS) == 2
    assert "--holdout 0.5: no pixel of the fitted part is scored" in capsys.readouterr().err
    assert main([*ARRAYS, "--holdout", "0.4"]) == 0


def test_the_progress_bar_needs_tqdm(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(ARRAYS) == 2
    assert "the progress bar needs the package tqdm" in capsys.readouterr().err


def test_parameters_round_trip(tmp_path):
    write_parameters(tmp_path / "crf.json", TEXTBOOK, "exact", 3, note="mine")
    assert read_parameters(tmp_path / "crf.json", 3) == (TEXTBOOK, "exact")
    with pytest.raises(UserError, match="cannot be written"):
        write_parameters(tmp_path, TEXTBOOK, "exact", 3)


FILES = {
    "not a readable JSON": "{",
    'expected "parameters" with theta_alpha': "[]",
    'expected "parameters" with': '{"parameters": {"theta_alpha": 3}}',
    "theta_beta is -1": {"theta_beta": -1},
    "theta_gamma is '3'": {"theta_gamma": "3"},
    "bilateral_weight is nan": {"bilateral_weight": float("nan")},
    "iterations is 2.5": {"iterations": 2.5},
    "iterations is True": {"iterations": True},
    "theta_alpha is 1000": {"theta_alpha": 10**400},
    "method must be one of auto, lattice, exact, got 'fast'": {"method": "fast"},
}


@pytest.mark.parametrize("message", FILES)
def test_files_that_are_no_parameters(tmp_path, message):
    content = FILES[message]
    if isinstance(content, dict):
        found = {**TEXTBOOK._asdict(), "method": "auto", **content}
        content = json.dumps({"parameters": found, "channels": 3})
    (tmp_path / "crf.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_parameters(tmp_path / "crf.json", 3)
    with pytest.raises(UserError, match="No such file"):
        read_parameters(tmp_path / "absent.json", 3)


def test_colors_are_the_file_s_where_it_has_8_bits(tmp_path):
    pixels = np.random.default_rng(0).integers(20, 90, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "color.png")
    color = read_colors(tmp_path / "color.png")
    assert color.dtype == torch.float32 and np.array_equal(color.movedim(0, -1), pixels)
    gray = pixels[..., 0]
    Image.fromarray(gray).save(tmp_path / "8.png")
    assert torch.equal(read_colors(tmp_path / "8.png", 1)[0], torch.from_numpy(gray).float())
    assert torch.equal(read_colors(tmp_path / "8.png", 3)[2], torch.from_numpy(gray).float())
    Image.fromarray(gray.astype(np.uint16) * 11).save(tmp_path / "16.png")
    assert torch.equal(read_colors(tmp_path / "16.png", 1), 255 * normalize(gray[None]))
