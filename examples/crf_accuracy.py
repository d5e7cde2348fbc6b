"""How far pydensecrf's lattice is from exact mean field, and segfast's lattice from pydensecrf's.

python examples/crf_accuracy.py [SIZE [PHOTO ...]]

On crops of scikit-image's photographs. The labels are segments of the photograph by its colors; the
network's logits are made up: the labels averaged over 8 x 8 pixels, noise added, and interpolated. Needs
scikit-image and pydensecrf2.
"""

import sys
from importlib.metadata import version

import numpy as np
import pydensecrf.densecrf
import skimage.data
import torch
import torch.nn.functional as F
from skimage.segmentation import felzenszwalb

import segfast.crf

LABELS, ITERATIONS = 21, 10
# theta_alpha, theta_beta and the weight of the bilateral term; theta_gamma and the spatial weight are 3.
PARAMETERS = [(80, 13, 10), (67, 3, 4), (49, 5, 4)]

size = int(sys.argv[1]) if len(sys.argv) > 1 else 128
photos = sys.argv[2:] or ["astronaut", "coffee", "chelsea", "rocket"]


def crop(photo: str) -> np.ndarray:
    """The middle of the photograph: uint8 [size, size, 3]."""
    image = getattr(skimage.data, photo)()[..., :3]
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def energies(image: np.ndarray) -> np.ndarray:
    """Negative log probabilities: float32 [labels, size * size]."""
    labels = torch.from_numpy(felzenszwalb(image, scale=100, min_size=40)) * 7919 % LABELS
    logits = F.avg_pool2d(6 * F.one_hot(labels, LABELS).movedim(-1, 0)[None].float(), 8, ceil_mode=True)
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(logits, (size, size), mode="bilinear")
    return -logits[0].log_softmax(0).flatten(1).numpy()


def infer(dcrf, image: np.ndarray, unary: np.ndarray, alpha: float, beta: float, weight: float, **method):
    d = dcrf.DenseCRF2D(size, size, LABELS, **method)
    d.setUnaryEnergy(unary)
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=alpha, srgb=beta, rgbim=image, compat=weight)
    return np.array(d.inference(ITERATIONS))


print(f"{size}x{size}, {LABELS} labels, {ITERATIONS} iterations; Q: label probabilities [labels, pixels]\n")
print(
    "| photo | theta_alpha/theta_beta, weight | pydensecrf from exact: mean over pixels of sum abs dQ | ",
    end="",
)
print("pixels with a dQ above 0.1 | other label | segfast's lattice from pydensecrf: max abs dQ |")
print("|---|---|---|---|---|---|")
for photo in photos:
    image = crop(photo)
    unary = energies(image)
    for alpha, beta, weight in PARAMETERS:
        theirs = infer(pydensecrf.densecrf, image, unary, alpha, beta, weight)
        exact, lattice = (
            infer(segfast.crf, image, unary, alpha, beta, weight, method=method)
            for method in ("exact", "lattice")
        )
        off = np.abs(theirs - exact)
        other = (theirs.argmax(0) != exact.argmax(0)).mean()
        print(f"| {photo} | {alpha}/{beta}, {weight} | {off.sum(0).mean():.1e}", end="")
        print(f" | {(off.max(0) > 0.1).mean():.2%} | {other:.2%}", end="")
        print(f" | {np.abs(theirs - lattice).max():.1e} |", flush=True)
names = ("torch-segfast", "pydensecrf2", "scikit-image", "torch")
print(
    "\n"
    + ", ".join(f"{name} {segfast.__version__ if 'segfast' in name else version(name)}" for name in names)
)
