"""Refine a network's mask along the edges of the photo, by mean field in a dense CRF: two ways to write it.

python examples/crf_refine.py [PHOTO]
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import segfast
import segfast.crf as dcrf
from segfast.crf.utils import unary_from_softmax
from segfast.data import astronaut, read_photo, write_image
from segfast.models import SelfieSegmenter

photo = read_photo(sys.argv[1]) if len(sys.argv) > 1 else astronaut()  # uint8 [3, H, W]
height, width = photo.shape[1:]

with torch.inference_mode():
    network = SelfieSegmenter(pretrained=True).eval()
    small = F.interpolate(photo[None].float(), (256, 256), mode="bilinear", antialias=True) / 255
    person = F.interpolate(network(small).sigmoid(), (height, width), mode="bilinear").clamp(0, 1)[0, 0]
probabilities = torch.stack([1 - person, person])  # [labels, H, W]

# These values were fitted to nothing. `segfast crf-fit` fits them to your data, and may find that none helps.
parameters = {
    "theta_alpha": 40,
    "theta_beta": 8,
    "theta_gamma": 3,
    "bilateral_weight": 3,
    "spatial_weight": 3,
}

# In PyTorch: on the tensors' device, in batches too, with gradients.
unary = -probabilities.clamp_min(1e-5).log()
refined = segfast.functional.mean_field(unary, photo, iterations=5, method="lattice", **parameters)

# As a script for pydensecrf has it. Only the import is another.
d = dcrf.DenseCRF2D(width, height, 2, method="lattice")
d.setUnaryEnergy(unary_from_softmax(probabilities.numpy()))
d.addPairwiseGaussian(sxy=3, compat=3)
d.addPairwiseBilateral(sxy=40, srgb=8, rgbim=photo.movedim(0, -1).numpy(), compat=3)
same = np.array(d.inference(5)).reshape(2, height, width)

print(f"largest difference between the two: {np.abs(same - refined.numpy()).max():.1e}")
changed = ((refined[1] >= 0.5) != (person >= 0.5)).double().mean()
print(f"{changed:.2%} of the pixels changed sides")
write_image("out/crf_refine.png", (255 * torch.cat([person, refined[1]], 1)).round().byte())
print("wrote out/crf_refine.png: the network's mask, and the refined one")
