"""The reference training loop, its metrics and its checkpoints."""

from ._augment import PatchSampler
from ._checkpoint import load_checkpoint, save_checkpoint
from ._loop import Options, evaluate, evaluate_regression, fit, regression_loss
from ._metrics import RegressionScores, Scores, confusion_matrix, regression_scores, scores
from ._predict import predict, predict_scores

__all__ = [
    "Options",
    "PatchSampler",
    "RegressionScores",
    "Scores",
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
