"""`segfast demo`, a few steps of it; the full run is `make demo`."""

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from segfast.cli import main
from segfast.commands import demo
from segfast.commands._crf_parameters import TEXTBOOK, refine
from segfast.commands._crf_search import Labeled
from segfast.commands._load_model import default_device
from segfast.commands._train_data import nuclei_samples
from segfast.data import Sample, astronaut
from segfast.train import load_checkpoint


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_best_threshold_of_the_held_out_region():
    _, [test] = nuclei_samples()
    assert test.target.shape == (512, 128)
    threshold = demo.best_threshold(test)
    iou = demo.foreground_iou((test.image[0] >= threshold).long(), test.target)
    assert iou == pytest.approx(0.7761521, abs=1e-6)
    others = test.image[0].unique()[::9]
    assert all(demo.foreground_iou((test.image[0] >= t).long(), test.target) <= iou for t in others)


def test_best_threshold_with_ties():
    image = torch.tensor([[[0.5, 0.5, 0.5, 0.2, 0.9]]])
    target = torch.tensor([[1, 1, 0, 0, 1]])
    assert demo.best_threshold(Sample(image, target)) == 0.5  # IoU 3/4; 0.9 gives 1/3, 0.2 gives 3/5


def test_a_short_run_misses_the_bar_and_leaves_everything(elsewhere, capsys, monkeypatch):
    reports = []
    monkeypatch.setattr(demo, "CRF_TRIALS", 3)
    monkeypatch.setattr(demo, "write_quick_report", lambda *args: reports.append(args))
    assert main(["demo", "--steps", "3"]) == 1
    output = capsys.readouterr()
    *_, verdict, _, seconds = output.out.splitlines()
    assert "orth it: " in verdict and seconds.endswith(" s in all.")
    assert "0.776" in output.out and "required" in output.out and "decoder.0.up" in output.out
    assert output.err.splitlines()[-1].startswith("FAILED: foreground IoU") and "3/3" in output.err
    with Image.open("out/demo.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 1000
    with Image.open("out/segment.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 500
    with Image.open("out/crf.png") as picture:
        assert picture.size[0] > 1500 and picture.size[1] > 700
    assert "textbook CRF" in output.out and "fitted CRF" in output.out and "`segfast crf-fit`" in output.out
    assert load_checkpoint("out/demo.safetensors").config["width"] == demo.WIDTH
    assert reports == [(Path("out"), default_device())]


def test_reaching_the_bar_is_exit_0(elsewhere, capsys, monkeypatch):
    """With a network that cannot fail: it answers with the truth."""
    _, [test] = nuclei_samples()
    monkeypatch.setattr(demo, "write_quick_report", lambda *args: None)
    monkeypatch.setattr(demo, "refine_masks", lambda *args: None)
    monkeypatch.setattr(demo, "check_model", lambda *args, **kwargs: "")
    monkeypatch.setattr(demo, "predict", lambda model, image: test.target)
    assert main(["demo", "--steps", "1"]) == 0
    assert "1.000" in capsys.readouterr().out


def test_the_portrait_is_drawn_with_its_mask(elsewhere, capsys, monkeypatch):
    panels = []
    monkeypatch.setattr(Axes, "imshow", lambda axes, panel, **options: panels.append(torch.tensor(panel)))
    demo.segment_portrait(Path("out/segment.png"))
    photo, mask, tinted = panels
    assert torch.equal(photo, astronaut().movedim(0, -1)) and mask.shape == (512, 512)
    assert torch.equal(tinted[mask == 1], photo[mask == 1]) and mask.max() == 1
    assert f"{mask.mean():.0%} of it is person" in " ".join(capsys.readouterr().out.split())


def test_the_crf_is_fitted_to_one_half_and_measured_on_the_other(elsewhere, capsys, monkeypatch):
    _, [test] = nuclei_samples()
    # A network that knows the lower half, and of the upper that most of it is background.
    foreground = torch.full((512, 128), 0.1)
    foreground[256:] = 0.01 + 0.98 * test.target[256:]
    nuclei = Labeled(torch.stack([1 - foreground, foreground]), 255 * test.image, test.target)
    fitted, panels = [], []
    best = TEXTBOOK._replace(iterations=1)
    monkeypatch.setattr(demo, "search", lambda part, trials: fitted.extend(part) or (best, trials))
    monkeypatch.setattr(Axes, "imshow", lambda axes, panel, **options: panels.append(torch.tensor(panel)))
    portrait = torch.zeros(512, 512)
    portrait[100:, 100:400] = 1
    demo.refine_masks(Path("out/crf.png"), nuclei, portrait)
    [upper] = fitted
    assert torch.equal(upper.target, test.target[:256])
    printed = capsys.readouterr().out
    assert "lower half: mean IoU %" in printed and "network alone  100.00" in printed
    assert "LOWERS the mean IoU" in printed
    assert torch.equal(panels[0], astronaut().movedim(0, -1)) and torch.equal(panels[1], portrait)
    assert not torch.equal(panels[2], portrait)
    assert torch.equal(panels[5], foreground[256:].T) and panels[4].shape == (128, 256, 3)
    refined = refine(nuclei.probabilities[:, 256:], nuclei.image[:, 256:], best)
    assert torch.equal(panels[6], refined[1].T)


def test_quick_report(elsewhere, capsys, monkeypatch):
    folders = []
    monkeypatch.setattr(
        "benchmarks.quick.quick_report", lambda folder, device: folders.append((folder, device)) or "the page"
    )
    device = torch.device("cpu")
    before = list(sys.path)
    demo.write_quick_report(Path("out"), device)
    assert folders == [(Path("out/benchmark/quick"), device)] and "wrote the page" in capsys.readouterr().out
    assert sys.path == before
    monkeypatch.setattr(demo, "__file__", "elsewhere/segfast/commands/demo.py")
    demo.write_quick_report(Path("out"), device)
    assert "needs the folder benchmarks/" in capsys.readouterr().out and len(folders) == 1


def test_training_is_seeded():
    train, [test] = nuclei_samples()
    scores = [demo.trained_model(train, 2, seed)(test.image[None, :, :32]).detach() for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
