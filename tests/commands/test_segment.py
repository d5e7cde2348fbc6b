"""`segfast segment`: photos of every kind in, masks and overlays out, and nobody's files overwritten."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image

from segfast.cli import main
from segfast.commands import segment
from segfast.commands._crf_figure import Refined, crf_figure
from segfast.commands._crf_parameters import NO_CRF, Parameters, refine, write_parameters
from segfast.data import astronaut, read_photo, write_image


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    return Image.fromarray(astronaut().movedim(0, -1).numpy())


@pytest.fixture(scope="module")
def model():
    return segment.load_segmenter()


@pytest.fixture
def photo(tmp_path, monkeypatch, portrait) -> str:
    """A portrait 200 wide and 150 high, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    portrait.resize((200, 150)).save("photo.png")
    return "photo.png"


def pixels(path: str | Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


def test_the_astronaut_and_not_the_rocket(model):
    mask = segment.person_mask(model, astronaut())
    assert mask.shape == (512, 512) and mask.dtype is torch.float32
    assert mask.min() >= 0 and mask.max() <= 1
    face, suit = mask[50:140, 190:265], mask[300:400, 100:240]
    rocket, flag = mask[20:220, 360:480], mask[20:160, 10:80]
    assert face.min() > 0.95 and suit.mean() > 0.95
    assert rocket.max() < 0.05 and flag.max() < 0.05


def test_mask_has_soft_edges_at_the_photos_size(model):
    large = F.interpolate(astronaut()[None], (1024, 768), mode="bilinear")[0]
    mask = segment.person_mask(model, large)
    assert mask.shape == (1024, 768)
    assert ((mask > 0.1) & (mask < 0.9)).double().mean() > 0.005
    # Interpolated, not enlarged pixel by pixel: along an edge, neighbors differ.
    edge = (mask[:, 1:] > 0.1) & (mask[:, 1:] < 0.9)
    assert (mask[:, 1:] != mask[:, :-1])[edge].double().mean() > 0.99


def test_overlay_keeps_the_person_and_tints_the_rest():
    photo = torch.randint(256, (3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0]).expand(4, 6)
    result = segment.overlay(photo, mask).int()
    assert torch.equal(result[..., 4:], photo[..., 4:].int())
    gray = 0.299 * photo[0] + 0.587 * photo[1] + 0.114 * photo[2]
    for channel, color in enumerate(segment.COLOR):
        # Within what 8 bits lose, step by step.
        background = (1 - segment.STRENGTH) * gray + segment.STRENGTH * color
        assert (result[channel, :, :2] - background[:, :2]).abs().max() <= 2
        assert (result[channel, :, 2:4] - (background + photo[channel])[:, 2:4] / 2).abs().max() <= 2


def test_one_photo(photo, capsys):
    before = Path(photo).read_bytes()
    assert main(["segment", photo]) == 0
    mask, overlay = pixels("out/photo.mask.png"), pixels("out/photo.overlay.png")
    assert mask.shape == (150, 200) and overlay.shape == (150, 200, 3)
    assert len(mask.unique()) > 50 and mask.min() == 0 and mask.max() == 255
    captured = capsys.readouterr()
    assert "150x200" in captured.out and "out/photo.overlay.png" in captured.out and captured.err == ""
    share = f"{mask.double().mean() / 255:.0%}"
    assert 45 < float(share.rstrip("%")) < 65 and share[:-1] in captured.out
    assert sorted(p.name for p in Path("out").iterdir()) == ["photo.mask.png", "photo.overlay.png"]
    assert Path(photo).read_bytes() == before
    assert main(["segment", photo]) == 0  # its own results may be replaced


def test_threshold(photo):
    assert main(["segment", photo]) == 0
    soft = pixels("out/photo.mask.png").int()
    assert main(["segment", photo, "--threshold", "0.3"]) == 0
    hard = pixels("out/photo.mask.png").int()
    assert set(hard.unique().tolist()) == {0, 255}
    assert torch.equal(hard[soft > 0.31 * 255].unique(), torch.tensor([255], dtype=hard.dtype))
    assert torch.equal(hard[soft < 0.29 * 255].unique(), torch.tensor([0], dtype=hard.dtype))


def test_several_photos_and_a_folder(photo, portrait, capsys):
    portrait.resize((30, 60)).save("other.jpg")
    assert main(["segment", photo, "other.jpg", "-o", "results/today"]) == 0
    assert pixels("results/today/other.mask.png").shape == (60, 30)
    assert pixels("results/today/photo.overlay.png").shape == (150, 200, 3)
    captured = capsys.readouterr()
    assert "2/2" in captured.err and captured.out.count("results/today/") == 4


def test_a_named_output(photo):
    assert main(["segment", photo, "--output", "person.PNG"]) == 0
    assert pixels("person.PNG").shape == (150, 200)
    assert pixels("person.overlay.png").shape == (150, 200, 3)


@pytest.mark.parametrize("name", ["mine.png", "mine.overlay.png", "mine.crf.png"])
def test_a_file_of_the_user_stays_without_force(photo, capsys, name):
    Path(name).write_text("mine")
    arguments = ["segment", photo, "-o", "mine.png", *(["--crf"] if "crf" in name else [])]
    assert main(arguments) == 2
    assert f"{name}: exists and is not a file that segfast wrote" in capsys.readouterr().err
    assert Path(name).read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert pixels(name).dim() > 1


def test_the_photo_itself_stays_even_with_force(photo, capsys):
    before = Path(photo).read_bytes()
    assert main(["segment", photo, "-o", "./photo.png", "--force"]) == 2
    assert "photo.png: the result would replace the photo itself" in capsys.readouterr().err
    assert Path(photo).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["short.jpg"], "short.jpg: not a readable image (image file is truncated"),
        (["nan.tif"], "nan.tif: the image has pixels that are not finite"),
        (["photo.png", "photo.png"], "photo.png and photo.png would both be written to out/photo.mask.png"),
        (["photo.png", "text.png", "-o", "a.png"], "--output a.png: one file for 2 photos"),
        (["photo.png", "-o", "a.jpg"], "--output a.jpg: expected a name ending in .png, or a folder"),
        (["photo.png", "-o", "text.png/a.png"], "text.png is not a folder"),
        (["--crf", "photo.png"], "expected a name ending in .json; put photos before --crf"),
    ],
)
def test_mistakes(photo, portrait, capsys, arguments, message):
    Path("text.png").write_text("no image")
    portrait.save("short.jpg")
    Path("short.jpg").write_bytes(Path("short.jpg").read_bytes()[:20_000])
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save("nan.tif")
    assert main(["segment", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segfast") and message in error
    assert not Path("out").exists()


def test_without_tqdm_one_photo_works(photo, portrait, capsys, monkeypatch):
    portrait.save("other.png")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["segment", photo]) == 0
    assert main(["segment", photo, "other.png"]) == 2
    assert "the progress bar needs the package tqdm" in capsys.readouterr().err


SHAPES = {"point": (1, 1), "wide": (3000, 3), "tall": (2, 3000)}


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_any_size(photo, portrait, size):
    portrait.resize(size).save(photo)
    assert main(["segment", photo, "--crf"]) == 0
    assert pixels("out/photo.mask.png").shape == size[::-1]
    assert pixels("out/photo.overlay.png").shape == (*size[::-1], 3)


KINDS = {
    "gray": ("L", "png"),
    "bilevel": ("1", "png"),
    "palette": ("P", "png"),
    "gif": ("P", "gif"),
    "gray and alpha": ("LA", "png"),
    "alpha": ("RGBA", "png"),
    "print": ("CMYK", "jpg"),
    "jpeg": ("RGB", "jpg"),
    "webp": ("RGB", "webp"),
    "lab": ("LAB", "tif"),
}


@pytest.mark.parametrize(("mode", "suffix"), KINDS.values(), ids=KINDS)
def test_any_mode(tmp_path, portrait, model, mode, suffix):
    path = tmp_path / f"photo.{suffix}"
    portrait.convert(mode).save(path)
    photo = read_photo(path)
    assert photo.shape == (3, 512, 512) and photo.dtype is torch.uint8
    blurred = [F.avg_pool2d(image.float().mean(0)[None], 16) for image in (photo, astronaut())]
    assert (blurred[0] - blurred[1]).abs().mean() < 6
    expected = segment.person_mask(model, astronaut())
    assert (segment.person_mask(model, photo) - expected).abs().mean() < 0.1


def test_16_bit_and_floating_point_gray(tmp_path, portrait):
    gray = np.asarray(portrait.convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    stretched = (gray - gray.min()) * (255 / np.ptp(gray))
    for name, values in {"16.png": gray, "32.tif": stretched, "float.tif": stretched}.items():
        if name != "16.png":
            dtype = np.int32 if name == "32.tif" else np.float32
            Image.fromarray(gray.astype(dtype) * 3 - 7).save(tmp_path / name)
        photo = read_photo(tmp_path / name)
        assert torch.equal(photo[0], photo[2])
        assert np.abs(photo[1].numpy() - values).max() <= 0.51, name
    Image.fromarray(np.full((2, 3), 7.0, np.float32)).save(tmp_path / "flat.tif")
    assert torch.equal(read_photo(tmp_path / "flat.tif"), torch.zeros(3, 2, 3, dtype=torch.uint8))


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 51, 255
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    assert read_photo(tmp_path / "alpha.png")[:, 0].T.tolist() == [[255] * 3, [204] * 3, [0] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_photo(tmp_path / "palette.png")[:, 0].T.tolist() == [[255] * 3, [40, 50, 60]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """As a viewer turns it: its first pixel goes where the standard has the first row and column."""
    stored = torch.zeros(2, 3, 3, dtype=torch.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored.numpy()).save(tmp_path / "photo.png", exif=exif)
    shown = read_photo(tmp_path / "photo.png")[0]
    assert shown.shape == ((2, 3) if orientation < 5 else (3, 2))
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    assert shown.nonzero().tolist() == [[(shown.shape[0] - 1) * bottom, (shown.shape[1] - 1) * right]]


def test_first_of_several_frames(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (200, 30)]
    frames[0].save(tmp_path / "photo.gif", save_all=True, append_images=frames[1:])
    assert (read_photo(tmp_path / "photo.gif") == 200).all()


def test_write_image_round_trip(tmp_path):
    gray = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    color = torch.stack((gray, 2 * gray, 3 * gray))
    write_image(tmp_path / "gray.png", gray)
    write_image(tmp_path / "color.png", color)
    assert torch.equal(pixels(tmp_path / "gray.png"), gray)
    assert torch.equal(read_photo(tmp_path / "color.png"), color)


def disc(side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A photo of a disc, the disc, and a mask of it that is blurred and has a hole."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    truth = ((y - side / 2).square() + (x - side / 2).square() < side**2 / 12).float()
    photo = torch.stack([60 + 120 * truth, 90 - 30 * truth, 90 + 0 * truth]).byte()
    mask = F.avg_pool2d(truth[None], side // 4 + 1, 1, side // 8, count_include_pad=False)[0]
    mask[side // 2 :, side // 2 : side // 2 + 3] = 0.3
    return photo, truth, mask


def test_refined_mask_follows_the_photo():
    photo, truth, mask = disc(96)
    refined = segment.refined_mask(mask, photo)
    assert refined.shape == mask.shape and 0 <= refined.min() <= refined.max() <= 1
    assert (mask - truth).abs().mean() > 0.05 > 10 * (refined - truth).abs().mean()


def test_refined_mask_of_a_large_photo_is_that_of_a_small_one(monkeypatch):
    """Standard deviations in pixels shrink with the photo; those of a file are for the photo's own size."""
    photo, truth, mask = disc(96)
    calls = []

    def errors(found: torch.Tensor) -> torch.Tensor:
        return ((found >= 0.5) != truth.bool()).double().mean()

    monkeypatch.setattr(
        segment,
        "refine",
        lambda p, image, *rest: calls.append((p.shape, image.shape, *rest)) or refine(p, image, *rest),
    )
    monkeypatch.setattr(segment, "MAX_PIXELS", 48 * 48)
    fitted = Parameters(20.0, 9.0, 4.0, 2.0, 1.0, 5), "exact"
    for given in (None, fitted):
        refined = segment.refined_mask(mask, photo, given)
        assert refined.shape == (96, 96) and errors(refined) < 0.7 * errors(mask)
    own, (p_shape, image_shape, parameters, method) = calls
    assert p_shape == (2, 48, 48) and image_shape == (3, 48, 48)
    assert (parameters, method) == (fitted[0]._replace(theta_alpha=10.0, theta_gamma=2.0), "exact")
    assert own[2].theta_alpha == pytest.approx(segment.UNFITTED.theta_alpha * 48 / 512) and own[3] == "auto"


def test_crf_writes_the_refined_mask_and_a_picture(photo, capsys):
    assert main(["segment", photo]) == 0
    soft = pixels("out/photo.mask.png")
    capsys.readouterr()
    assert main(["segment", photo, "--crf"]) == 0
    captured = capsys.readouterr()
    assert "1/1" in captured.err and "out/photo.crf.png" in captured.out
    refined = pixels("out/photo.mask.png")
    mask = segment.person_mask(segment.load_segmenter(), read_photo(photo))
    expected = (255 * segment.refined_mask(mask, read_photo(photo))).round().byte()
    assert torch.equal(refined, expected) and (refined.int() - soft.int()).abs().double().mean() > 2
    assert torch.equal(
        pixels("out/photo.overlay.png").movedim(-1, 0), segment.overlay(read_photo(photo), refined / 255)
    )
    assert pixels("out/photo.crf.png").shape[1] > 1500
    assert main(["segment", photo, "--crf", "--threshold", "0.5", "-o", "person.png"]) == 0
    assert torch.equal(pixels("person.png") == 255, refined >= 128) and Path("person.crf.png").exists()


def test_crf_with_the_parameters_of_a_file(photo, capsys):
    write_parameters("none.json", NO_CRF, "auto", 3)
    write_parameters("some.json", NO_CRF._replace(spatial_weight=3.0, iterations=5), "exact", 3)
    masks = []
    for arguments in ([], ["--crf", "none.json"], ["--crf", "some.json"]):
        assert main(["segment", photo, *arguments]) == 0
        masks.append(pixels("out/photo.mask.png").int())
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_the_picture_s_panels(photo, monkeypatch):
    panels, titles = [], []
    monkeypatch.setattr(Axes, "imshow", lambda axes, panel, **options: panels.append(torch.tensor(panel)))
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, **options: titles.append(title))
    assert main(["segment", photo, "--crf", "--threshold", "0.5"]) == 0
    assert titles == ["photo", "network's mask", "refined by the CRF", "difference"]
    image, before, after, difference = panels
    assert torch.equal(image, read_photo(photo).movedim(0, -1)) and not torch.equal(before, after)
    assert torch.equal(after.byte() * 255, pixels("out/photo.mask.png"))
    for changed, color in ((after > before, "#e69f00"), (after < before, "#56b4e9")):
        assert changed.any() and (difference[changed] - torch.tensor(to_rgb(color))).abs().max() < 1e-6
    gray = image.double().mean(-1, keepdim=True) / 510
    assert (difference - gray)[after == before].abs().max() < 1e-6


def test_the_picture_of_a_large_photo_is_small():
    photo, mask = torch.zeros(3, 900, 900, dtype=torch.uint8), torch.rand(900, 900)
    figure = crf_figure(
        [Refined(photo, mask, mask), Refined(photo[:1, :301], mask[:301], mask[:301])], "both"
    )
    sizes = [axes.images[0].get_array().shape[:2] for axes in figure.axes]
    assert sizes == [(700, 700)] * 4 + [(234, 700)] * 4


def test_computes_on_one_thread_and_gives_the_others_back(photo, monkeypatch):
    counts = []
    monkeypatch.setattr(
        segment, "read_photo", lambda path: counts.append(torch.get_num_threads()) or read_photo(path)
    )
    torch.set_num_threads(2)
    try:
        assert main(["segment", photo]) == 0
        Path("bad.png").write_text("no image")
        assert main(["segment", "bad.png"]) == 2
        assert counts == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_without_matplotlib_nothing_is_written(photo, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["segment", photo, "--crf"]) == 2
    assert "pictures need the package matplotlib" in capsys.readouterr().err
    assert not Path("out").exists()
