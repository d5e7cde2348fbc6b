"""`segfast predict`: folders, tiles, averages, several processes, bad input, and memory."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segfast import cli
from segfast.data import Sample, normalize, read_image, read_mask
from segfast.models import UNet
from segfast.predict import TiledPredictor, predict_tiled
from segfast.train import Options, PatchSampler, fit, save_checkpoint

from ..train.conftest import discs, files_up_to
from ..train.processes import FROM_SERVER, segfast
from .test_mapped import save_tiff


def drawn(index):
    """An image of three classes, uint8, and these."""
    size = (40, 64, 90)[index]
    labels = discs(size, index, 3)
    pixels = 60 * labels + np.random.default_rng(index).integers(0, 40, (size, size))
    return pixels.astype(np.uint8), torch.from_numpy(labels).long()


@pytest.fixture(scope="module")
def network():
    """A network that knows the classes."""
    torch.manual_seed(0)
    model = UNet(1, 3, width=4, depth=2, norm="batch")
    pixels, labels = drawn(1)
    sampler = PatchSampler([Sample(normalize(pixels[None]), labels)], 32, 4)
    fit(model, sampler, Options(steps=40, lr=0.02))
    return model.eval()


@pytest.fixture
def work(tmp_path, monkeypatch, network):
    """Run in a folder with a network and images/: of three sizes, in as many formats."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for index in (0, 2):
        Image.fromarray(drawn(index)[0]).save(f"images/{'abc'[index]}.png")
    save_tiff(Path("images/b.tif"), drawn(1)[0])
    save_checkpoint(network, "net.safetensors")
    return tmp_path


PREDICT = ["predict", "--checkpoint", "net.safetensors"]


def masks(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_folder_in_tiles_with_averages(work, network, capsys):
    """As `TiledPredictor`, in files and in the table."""
    options = ["--tile", "32", "--method", "blend", "--overlap", "8", "--flips", "both", "--scales", "1,1.5"]
    command = [*PREDICT, "images", *options, "--average", "probabilities", "--output", "masks"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(("a.png", "b.tif", "c.png"), lines[-3:], strict=True):
        image = read_image(f"images/{name}")
        expected = predict_tiled(
            network,
            image,
            32,
            method="blend",
            overlap=8,
            flips="both",
            scales=(1, 1.5),
            average="probabilities",
        )
        found = read_mask(f"masks/{name[0]}.mask.png")
        assert (found != expected).double().mean() < 0.01 and len(found.unique()) > 1
        shares = " ".join(f"{share:.1%}" for share in (found.flatten().bincount(minlength=3) / found.numel()))
        assert f"images/{name}" in line and shares in line
    plain = masks("masks")
    assert cli.main([*PREDICT, "images", "--output", "masks"]) == 0
    assert masks("masks") != plain


def test_a_terminal_shows_how_far_it_is(work, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*PREDICT, "images"]) == 0
    assert "segmenting: 100%" in capsys.readouterr().err


@torch.no_grad()
def test_seams(work, network):
    """Exact tiles have the whole image's scores up to rounding; blended ones most of its classes."""
    image = read_image("images/c.png")
    whole = network(image[None])[0]
    for method, tile, allowed in (("exact", 32, 1e-5), ("blend", 64, 1.0)):
        scores = torch.empty_like(whole)
        for rows, columns, part in TiledPredictor(network, tile, method=method)(image):
            scores[:, rows, columns] = part
        seam = ((scores - whole).abs().max() / whole.abs().max()).item()
        print(f"{method}: largest difference from the whole image's scores {seam:.2g} of the largest")
        assert seam < allowed
        command = [*PREDICT, "images/c.png", "--tile", str(tile), "--method", method, "--output", "mask.png"]
        assert cli.main(command) == 0
        others = (read_mask("mask.png") != whole.argmax(0)).double().mean()
        assert others < (1e-3 if method == "exact" else 0.05), method


def test_two_processes_share_a_folder(work):
    [one] = segfast([*PREDICT, "images", "--output", "one"], work)
    both = segfast([*PREDICT, "images", "--output", "two"], work, ranks=2)
    assert [rank.code for rank in (one, *both)] == [0, 0, 0], both
    assert masks("one") == masks("two") and len(masks("one")) == 3
    assert both[0].output == one.output.replace("one/", "two/") and both[1].output == ""
    Path("images/b.tif").write_text("no image")
    both = segfast([*PREDICT, "images", "--output", "two"], work, ranks=2)
    assert [rank.code for rank in both] == [2, 2]
    assert both[1].output.startswith("segfast: images/b.tif: not a readable image")
    assert "images/c.png" in both[0].output and "b.tif" not in both[0].output


def fails(capsys, *arguments):
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    assert cli.main([*PREDICT, *arguments]) == 2
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "empty: no file ending in one of .png"),
        (["absent"], "absent: no such file"),
        (
            ["images", "--output", "m.png"],
            "--output names one file, there are 3 images; a folder takes",
        ),
        (["images/a.png", "--overlap", "600"], "--overlap must be from 0 to half of tile=1024, 512; got 600"),
        (["images/a.png", "--overlap", "8", "--method", "exact"], "--overlap is of method='blend', got 8"),
        (["images/a.png", "--scales", "1,x"], "--scales must be numbers with commas between, as in"),
        (["images/a.png", "--scales", "0"], "--scales must be positive numbers, at least one; got (0.0,)"),
        (
            ["images/c.png", "--tile", "30"],
            "images/c.png: tile must be a multiple of the network's stride, 4,",
        ),
        (
            ["color.png", "--checkpoint", "two.safetensors"],
            "color.png: the image has 3 channels, the network",
        ),
    ],
)
def test_mistakes(work, capsys, arguments, message):
    Path("empty").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("color.png")
    save_checkpoint(UNet(2, 3, width=2, depth=1), "two.safetensors")
    assert fails(capsys, *arguments).startswith(f"segfast: {message}")


def test_a_full_disk(work, capsys):
    assert cli.main([*PREDICT, "images/a.png"]) == 0
    before = Path("out/a.mask.png").read_bytes()
    capsys.readouterr()
    with files_up_to(500):
        line = fails(capsys, "images/a.png")
    assert line.startswith("segfast: out/a.mask.png: cannot be written (")
    assert masks("out") == {"a.mask.png": before}


def peak(arguments):
    """Run a command in this process, and write its largest resident memory, bytes, to a file."""
    torch.set_num_threads(1)
    assert cli.main(arguments) == 0
    Path("peak").write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_memory_does_not_depend_on_the_image_s_size(work):
    """Of an image sixteen times as large, 17 MB in bytes and four times that in single precision."""
    save_checkpoint(UNet(1, 2, width=1, depth=1), "net.safetensors")
    peaks = []
    for side in (1024, 4096):
        save_tiff(Path("large.tif"), np.zeros((side, side), np.uint8))
        process = FROM_SERVER.Process(target=peak, args=([*PREDICT, "large.tif", "--tile", "512"],))
        process.start()
        process.join()
        assert process.exitcode == 0
        peaks.append(int(Path("peak").read_text()))
        with Image.open("out/large.mask.png") as mask:
            assert mask.size == (side, side)
    assert peaks[1] - peaks[0] < 30e6
