"""Encoders and heads; any torch.nn.Module, taken apart."""

from fewshot.models.network import Network, conv4_pooled, conv4_strided, resnet12

__all__ = ["Network", "conv4_pooled", "conv4_strided", "resnet12"]
