"""A trained model on images of one's own."""

from fewshot.predict.predictions import Predictions, predict

__all__ = ["Predictions", "predict"]
