"""The reference training loop, its metrics and its checkpoints."""

from ._augment import PatchSampler
from ._checkpoint import load_checkpoint, save_checkpoint
from ._loop import Options, evaluate, fit
from ._metrics import Scores, confusion_matrix, scores
from ._predict import predict, predict_scores

__all__ = [
    "Options",
    "PatchSampler",
    "Scores",
    "confusion_matrix",
    "evaluate",
    "fit",
    "load_checkpoint",
    "predict",
    "predict_scores",
    "save_checkpoint",
    "scores",
]
