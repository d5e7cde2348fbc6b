"""Uncompressed TIFFs, mapped window by window: the pixels of `read_image`; all others are read by that."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from segfast._errors import UserError
from segfast.data import read_image
from segfast.data._mapped import MappedImage, open_image

GENERATOR = np.random.default_rng(0)
GRAY = GENERATOR.integers(3, 250, (37, 53)).astype(np.uint8)
DEEP = (GENERATOR.integers(0, 300, (37, 53)) ** 2).astype(np.uint16)
COLOR = GENERATOR.integers(0, 256, (37, 53, 3)).astype(np.uint8)
WINDOW = (slice(None), slice(30, 37), slice(7, 20))


def save_tiff(path, pixels, order="<", strips=3, planes=False, big=False):
    """An uncompressed TIFF `[H, W]` or `[H, W, C]`, as pillow writes none."""
    height, width, channels = (*pixels.shape, 1)[:3]
    data = np.moveaxis(pixels, -1, 0) if planes else pixels
    data = data.astype(pixels.dtype.newbyteorder(order)).tobytes()
    start = 16 if big else 8
    rows = -(-height // strips)  # of a strip
    row = len(data) // (height * channels if planes else height)
    ends = [min(end, height) for end in range(rows, height + rows, rows)]
    counts = np.diff([0, *ends]) * row
    counts = np.tile(counts, channels if planes else 1)
    tags = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * channels, 259: [1]}
    tags |= {262: [1 if channels == 1 else 2], 273: (start + counts.cumsum() - counts).tolist()}
    tags |= {277: [channels], 278: [rows], 279: counts.tolist(), 284: [2 if planes else 1]}
    kind, size, letter = (16, 8, "Q") if big else (4, 4, "L")
    entries, extra = b"", b""
    count_letter = "Q" if big else "H"
    after = start + len(data) + (8 if big else 2) + len(tags) * (20 if big else 12) + size
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(packed) > size:
            extra += packed
            packed = struct.pack(order + letter, after + len(extra) - len(packed))
        entries += struct.pack(f"{order}HH{letter}", tag, kind, len(values)) + packed
    head = b"II" if order == "<" else b"MM"
    head += (
        struct.pack(order + "HHHQ", 43, 8, 0, start + len(data))
        if big
        else struct.pack(order + "HL", 42, start + len(data))
    )
    entries = struct.pack(order + count_letter, len(tags)) + entries + bytes(size)
    path.write_bytes(head + data + entries + extra)


@pytest.mark.parametrize("options", [{}, {"order": ">"}, {"strips": 1}, {"big": True}, {"planes": True}])
@pytest.mark.parametrize("pixels", [GRAY, DEEP, COLOR])
def test_windows_are_those_of_the_whole_image(tmp_path, monkeypatch, pixels, options):
    if options.get("planes") and pixels.ndim == 2:
        options = {"strips": 37}
    save_tiff(tmp_path / "a.tif", pixels, **options)
    monkeypatch.setattr("segfast.data._mapped.PIXELS_AT_ONCE", 200)
    for channels in (1, 3):
        image = open_image(tmp_path / "a.tif", channels)
        np.savez(tmp_path / "a.npz", np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels)
        whole = read_image(tmp_path / "a.npz", channels)
        assert isinstance(image, MappedImage) and image.shape == (channels, 37, 53) == whole.shape
        torch.testing.assert_close(image[WINDOW], whole[WINDOW], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(image[:, 0:37, 0:53], whole, rtol=1e-6, atol=1e-6)
        assert image[WINDOW].dtype == torch.float32
    if pixels is not DEEP and not options.get("big"):
        torch.testing.assert_close(read_image(tmp_path / "a.tif"), read_image(tmp_path / "a.npz"))


def test_an_image_of_one_value_is_zero(tmp_path):
    save_tiff(tmp_path / "a.tif", np.full((4, 5), 7, np.uint8))
    assert not open_image(tmp_path / "a.tif")[:, 0:4, 0:5].any()


OTHERS = {
    "compressed": lambda path: Image.fromarray(GRAY).save(path, compression="tiff_lzw"),
    "palette": lambda path: Image.fromarray(GRAY).convert("P").save(path),
    "float": lambda path: Image.fromarray(GRAY.astype(np.float32)).save(path),
    "alpha": lambda path: Image.fromarray(np.dstack([COLOR, GRAY])).save(path),
    "turned": lambda path: Image.fromarray(GRAY).save(path, tiffinfo={274: 6}),
    "white is zero": lambda path: Image.fromarray(GRAY).save(path, tiffinfo={262: 0}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tiffs_are_read_whole(tmp_path, name):
    path = tmp_path / "a.tif"
    OTHERS[name](path)
    assert torch.equal(open_image(path), read_image(path))


@pytest.mark.filterwarnings("error")
def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.tif"
    save_tiff(path, GRAY)
    good = path.read_bytes()
    save_tiff(path, COLOR)
    with pytest.raises(UserError, match=r"a\.tif: the image has 3 channels, the network takes 2"):
        open_image(path, 2)
    Image.fromarray(GRAY).save(path)  # with its tags before the pixels
    cut = path.read_bytes()[:-500]
    for content in (cut, good[:100], good[:4], b"", good[:8] + bytes(len(good) - 8)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tif: not a readable image"):
            open_image(path)
    Image.fromarray(GRAY).save(path, save_all=True, append_images=[Image.fromarray(GRAY)])
    with pytest.raises(UserError, match=r"a\.tif: the file has 2 pages, expected one"):
        open_image(path)
    with pytest.raises(UserError, match=r"b\.tif: no such file"):
        open_image(tmp_path / "b.tif")
