"""Images of any size through a network in tiles, and averages over flips and scales of an image."""

from ._reach import NoReach, Reach, measure_reach
from ._tiled import METHODS, Tile, TiledPredictor, predict_tiled

__all__ = ["METHODS", "NoReach", "Reach", "Tile", "TiledPredictor", "measure_reach", "predict_tiled"]
