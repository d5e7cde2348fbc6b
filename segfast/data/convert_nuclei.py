"""Make `nuclei.npz` from the wheel it was taken from.

    pip download stardist==0.9.2 --no-deps
    python -m segfast.data.convert_nuclei stardist-0.9.2-*.whl nuclei.npz

Values are copied unchanged; only the container differs. See README.md beside this file for the source.
"""

import argparse
import io
import zipfile

import numpy as np

from segfast._files import atomic_write

IMAGE = "stardist/data/images/img2d.tif"
LABELS = "stardist/data/images/mask2d.tif"


def read_tif(wheel: zipfile.ZipFile, name: str) -> np.ndarray:
    """A single-page TIFF of the wheel, `[H, W]`, in its own dtype."""
    from PIL import Image

    with Image.open(io.BytesIO(wheel.read(name))) as page:
        return np.array(page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", help="stardist-0.9.2-*.whl")
    parser.add_argument("output", help="the .npz to write")
    args = parser.parse_args(argv)
    with zipfile.ZipFile(args.wheel) as wheel:
        image, labels = read_tif(wheel, IMAGE), read_tif(wheel, LABELS)
    if image.dtype != np.uint16 or image.shape != (512, 512) or labels.shape != image.shape:
        raise SystemExit(
            f"{args.wheel}: expected two 512x512 images, uint16, got {image.dtype} {image.shape}"
        )
    with atomic_write(args.output) as path:
        np.savez_compressed(path, image=image, labels=labels.astype(np.uint8))
    print(f"{args.output}: {labels.max()} is the largest label, {len(np.unique(labels)) - 1} nuclei")


if __name__ == "__main__":
    main()
