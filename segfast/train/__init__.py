"""The reference training loop, its losses, its metrics and its checkpoints."""

from ._augment import PatchSampler
from ._checkpoint import load_checkpoint, save_checkpoint
from ._loop import Trainer, evaluate, evaluate_regression, fit
from ._losses import class_loss, regression_loss
from ._metrics import RegressionScores, Scores, confusion_matrix, regression_scores, scores
from ._optimizers import Options
from ._predict import predict, predict_scores

__all__ = [
    "Options",
    "PatchSampler",
    "RegressionScores",
    "Scores",
    "Trainer",
    "class_loss",
    "confusion_matrix",
    "evaluate",
    "evaluate_regression",
    "fit",
    "load_checkpoint",
    "predict",
    "predict_scores",
    "regression_loss",
    "regression_scores",
    "save_checkpoint",
    "scores",
]
