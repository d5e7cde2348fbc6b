"""The shipped image, and images and masks from files good and bad."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from segfast._errors import UserError
from segfast.data import (
    NUCLEI_TRAIN_COLUMNS,
    convert_nuclei,
    normalize,
    nuclei,
    read_folder,
    read_image,
    read_mask,
    split_columns,
    write_mask,
)


def test_nuclei():
    image, labels = nuclei()
    assert image.shape == (1, 512, 512) and image.dtype is torch.float32
    assert (image.min(), image.max()) == (0, 1)
    assert labels.shape == (512, 512) and labels.dtype is torch.int64
    assert len(labels.unique()) == 126 and labels.min() == 0
    foreground = (labels > 0).double()
    assert foreground[:, :NUCLEI_TRAIN_COLUMNS].mean().item() == pytest.approx(0.20902506510416666)
    assert foreground[:, NUCLEI_TRAIN_COLUMNS:].mean().item() == pytest.approx(0.169830322265625)
    assert image[0][labels > 0].mean() > 2 * image[0][labels == 0].mean()


def test_convert_nuclei_copies_the_values(tmp_path, capsys):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 300, (512, 512)).astype(np.uint16)
    labels = generator.integers(0, 200, (512, 512)).astype(np.uint16)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name, array in ((convert_nuclei.IMAGE, image), (convert_nuclei.LABELS, labels)):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, format="TIFF")
            wheel.writestr(name, buffer.getvalue())
    convert_nuclei.main([str(tmp_path / "x.whl"), str(tmp_path / "n.npz")])
    with np.load(tmp_path / "n.npz") as archive:
        assert (archive["image"] == image).all() and (archive["labels"] == labels).all()
    assert "199 nuclei" in capsys.readouterr().out


def test_normalize_stretches_each_channel():
    ramp = np.arange(1000.0).reshape(1, 20, 50)
    image = normalize(np.concatenate([ramp, 5 + 1e4 * ramp, np.full_like(ramp, 7)]))
    assert image.dtype is torch.float32
    torch.testing.assert_close(image[0], image[1])
    assert image[0].min() == 0 and image[0].max() == 1 and (image[2] == 0).all()
    assert image[0].flatten()[500].item() == pytest.approx((500 - 9.99) / (997.002 - 9.99))


GRAY = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
COLOR = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], -1)


@pytest.mark.parametrize(
    ("name", "array", "mode"),
    [
        ("a.png", GRAY, None),
        ("a.tif", GRAY.astype(np.uint16) * 200, None),
        ("a.tiff", GRAY.astype(np.float32) / 7, None),
        ("a.png", GRAY > 90, None),
        ("a.png", GRAY, "LA"),
        ("a.png", COLOR, None),
        ("a.PNG", COLOR, "RGBA"),
        ("a.png", COLOR, "P"),
        ("a.jpg", COLOR, "CMYK"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_read_image(tmp_path, name, array, mode, channels):
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(tmp_path / name)
    image = read_image(tmp_path / name, channels)
    assert image.shape == (channels, 12, 16) and image.dtype is torch.float32
    assert image.min() == 0 and image.max() == 1
    if array is GRAY:
        torch.testing.assert_close(image, normalize(np.repeat(GRAY[None], channels, 0)))


def test_read_image_of_npz(tmp_path):
    np.savez(tmp_path / "one.npz", GRAY)
    np.savez(tmp_path / "two.npz", image=COLOR.transpose(2, 0, 1), labels=GRAY)
    assert read_image(tmp_path / "one.npz").shape == (1, 12, 16)
    assert read_image(tmp_path / "two.npz", 3).shape == (3, 12, 16)
    assert (read_mask(tmp_path / "two.npz") == torch.from_numpy(GRAY)).all()


def test_every_class_survives_a_mask(tmp_path):
    """Pillow writes 4 bits for a palette of 16 colors: class 16 came back as 0."""
    for labels in (torch.arange(256).reshape(16, 16), torch.full((2, 3), 20)):
        write_mask(tmp_path / "mask.png", labels)
        assert torch.equal(read_mask(tmp_path / "mask.png"), labels)


def test_mask_round_trip(tmp_path):
    labels = torch.randint(0, 9, (13, 17))
    write_mask(tmp_path / "m.png", labels)
    assert (read_mask(tmp_path / "m.png") == labels).all()
    with Image.open(tmp_path / "m.png") as shown:
        colors = np.array(shown.convert("RGB"))
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) > 2


def test_mask_foreground(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16) * 300).save(tmp_path / "instances.tif")
    assert (read_mask(tmp_path / "instances.tif", foreground=True) == torch.from_numpy(GRAY > 0)).all()


def save_npz(path, **arrays):
    np.savez(path, **arrays)


def save_pages(path):
    page = Image.fromarray(GRAY)
    page.save(path, save_all=True, append_images=[page, page])


BAD_IMAGES = {
    "missing.png": (lambda p: None, "no such file"),
    "folder.png": (lambda p: p.mkdir(), "not a file"),
    "notes.txt": (lambda p: p.write_text("hello"), "expected one of .png, .tif"),
    "text.png": (lambda p: p.write_text("hello"), "not a readable image"),
    "empty.jpg": (lambda p: p.touch(), "not a readable image"),
    "pages.tif": (save_pages, "3 pages, expected one"),
    "nan.npz": (lambda p: save_npz(p, image=np.full((4, 4), np.nan)), "not finite"),
    "empty.npz": (lambda p: save_npz(p, image=np.zeros((0, 4))), r"got shape \[1, 0, 4\]"),
    "line.npz": (lambda p: save_npz(p, image=np.zeros(4)), r"got shape \[4\]"),
    "complex.npz": (lambda p: save_npz(p, image=np.zeros((4, 4), complex)), "got complex128"),
    "names.npz": (
        lambda p: save_npz(p, a=GRAY, b=GRAY),
        r"no array named 'image', the file has \['a', 'b'\]",
    ),
    "object.npz": (lambda p: save_npz(p, image=np.array([{}])), "not a readable .npz"),
    "broken.npz": (lambda p: p.write_bytes(b"PK\x03\x04"), "not a readable .npz"),
    "blank.npz": (lambda p: p.touch(), "not a readable .npz"),
    "channels.npz": (lambda p: save_npz(p, image=np.zeros((5, 4, 4))), "has 5 channels, the network takes 1"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(tmp_path, name):
    make, message = BAD_IMAGES[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_truncated_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut\.png: not a readable image"):
        read_image(tmp_path / "cut.png")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (COLOR, r"expected a mask \[H, W\]"),
        (GRAY.astype(np.float32), "expected integer class indices, got float32"),
        (GRAY.astype(np.uint16) * 30, "got 0 to 5730; --foreground"),
        ((GRAY > 90).astype(np.uint8) * 255, "only 0 and 255.*--foreground"),
    ],
)
def test_bad_mask(tmp_path, array, message):
    Image.fromarray(array).save(tmp_path / "m.tif")
    with pytest.raises(UserError, match=message):
        read_mask(tmp_path / "m.tif")


def write_pair(folder, stem, size=(12, 16), mask_size=None):
    for kind, shape in (("images", size), ("masks", mask_size or size)):
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)).save(
            folder / kind / f"{stem}.png"
        )


def test_folder_and_split(tmp_path):
    write_pair(tmp_path, "b", (12, 16))
    write_pair(tmp_path, "a", (20, 40))
    samples = read_folder(tmp_path)
    assert [tuple(sample.image.shape) for sample in samples] == [(1, 20, 40), (1, 12, 16)]
    train, test = split_columns(samples, 0.25)
    assert [s.target.shape[1] for s in train] == [30, 12] and [s.target.shape[1] for s in test] == [10, 4]
    for sample, left, right in zip(samples, train, test, strict=True):
        assert (torch.cat([left.target, right.target], 1) == sample.target).all()
        assert (torch.cat([left.image, right.image], 2) == sample.image).all()


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="images: no such folder; expected FOLDER/images and FOLDER/masks"):
        read_folder(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="images: no file ending in"):
        read_folder(tmp_path)
    write_pair(tmp_path, "a", mask_size=(12, 15))
    with pytest.raises(UserError, match=r"a.png: the mask is 12x15, its image .* is 12x16"):
        read_folder(tmp_path)
    (tmp_path / "masks/a.png").rename(tmp_path / "masks/b.png")
    with pytest.raises(UserError, match=r"a.png: no mask named a\.\*"):
        read_folder(tmp_path)
    (tmp_path / "images/a.tif").touch()
    with pytest.raises(UserError, match="has the same name"):
        read_folder(tmp_path)


@pytest.mark.parametrize("holdout", [0, 1, -0.5, 0.999])
def test_bad_holdout(tmp_path, holdout):
    write_pair(tmp_path, "a")
    with pytest.raises(UserError, match=f"--holdout {holdout}"):
        split_columns(read_folder(tmp_path), holdout)
