"""A network of somebody else's, taken apart into encoder and head.

Shapes: B images of C channels, H x W pixels; d features; K ways.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fewshot.errors import UserError, first_line
from fewshot.models.network import Network

log = logging.getLogger(__name__)


def network_from_module(
    module: nn.Module,
    *,
    channels: int,
    size: int,
    ways: int,
    head: str | None = None,
    init_scale: float = 1.0,
    head_bias: bool = True,
) -> Network:
    """The module as a Network: an encoder with its own weights and a new head, (B, channels, size, size) -> (B, K).

    BatchNorm uses the batch's statistics (method.md section 3), and dropout is left out: both engines have to compute
    the same gradient, and validation has to leave no trace.

    Args:
        module: takes (B, C, H, W) and ends in a linear layer; it is changed in place.
        head: name of that layer; None: the module is run to find it.

    Raises:
        UserError: the module cannot be taken apart like this, or cannot be adapted.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"model.module: gives a {type(module).__name__}; its _target_ must make a torch.nn.Module")
    for layer in module.modules():
        if getattr(layer, "track_running_stats", False):
            layer.track_running_stats = False  # pyright: ignore[reportArgumentType]
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None  # pyright: ignore[reportArgumentType]
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    before, buffers = images.clone(), {name: buffer.clone() for name, buffer in module.named_buffers()}
    name, logits = _head(module.eval(), images, head)
    last: Any = module.get_submodule(name)
    module.set_submodule(name, nn.Identity())  # what is left is the encoder
    features = _forward(module, images)
    kind = type(module).__name__
    if not isinstance(features, Tensor) or features.shape != (2, last.in_features):
        raise UserError(f"model.module: {kind} gives {name} no features of (images, {last.in_features}); flatten them")
    if not torch.allclose(nn.functional.linear(features, last.weight, last.bias), logits, rtol=1e-4, atol=1e-5):
        made = f"{name}.weight times features plus bias; it must be a plain torch.nn.Linear, and nothing may be random"
        raise UserError(f"model.module: the output of {kind} is not {made}")
    if not torch.equal(images, before):
        raise UserError(f"model.module: {kind} writes into its images; let its first layer not work in place")
    for buffer, value in module.named_buffers():
        if not torch.equal(value, buffers[buffer]):
            raise UserError(
                f"model.module: {kind} changes its buffer {buffer} in every forward; it must leave no trace"
            )
    network = Network(module, last.in_features, ways, init_scale, head_bias, own_weights=True)
    _check_adaptable(network, images, kind)
    dropout = [name for name, layer in module.named_modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if dropout:
        log.info(f"model=module: the dropout of {kind} ({', '.join(dropout)}) is left out")
    return network


def _head(module: nn.Module, images: Tensor, wanted: str | None) -> tuple[str, Tensor]:
    """The name of the linear layer whose output is the module's, and that output."""
    kind, calls = type(module).__name__, []
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: calls.append((name, output)))
        for name, layer in linear.items()
    ]
    logits = _forward(module, images)
    for hook in hooks:
        hook.remove()
    if not linear:
        raise UserError(f"model.module: {kind} has no torch.nn.Linear; give one that ends in it, which is the head")
    if wanted is not None and wanted not in linear:
        raise UserError(f"model.head={wanted}: {kind} has no such linear layer; it has {', '.join(linear)}")
    last = [name for name, output in calls if output is logits]
    if not last:
        raise UserError(
            f"model.module: the output of {kind} is not that of a linear layer; it must end in one (logits)"
        )
    if logits.shape[:-1] != (len(images),):
        raise UserError(f"model.module: {kind} turns 2 images into {tuple(logits.shape)}; it must give (2, classes)")
    if wanted not in (None, *last):
        raise UserError(f"model.head={wanted}: the output of {kind} comes from {last[0]}; use model.head={last[0]}")
    if [name for name, _ in calls].count(last[0]) > 1:
        raise UserError(f"model.module: {kind} runs {last[0]} several times; the head must be run once, at the end")
    return last[0], logits


def _forward(module: nn.Module, images: Tensor) -> Any:
    try:
        with torch.no_grad():
            return module(images)
    except Exception as error:  # whatever it makes of images that it was not made for
        _, channels, size, _ = images.shape
        kinds = {str(parameter.dtype) for parameter in module.parameters()} - {str(images.dtype)}
        sizes = "use a dataset with the channels and the size that it takes"
        remedy = "give it weights of torch.float32, by .float()" if kinds else sizes
        failed = f"{type(module).__name__} fails on such images ({first_line(error)}); {remedy}"
        raise UserError(f"dataset.channels={channels} dataset.size={size}: {failed}") from error


def _check_adaptable(network: Network, images: Tensor, kind: str) -> None:
    """Raises UserError where a parameter gets no gradient from the output: the inner loop adapts all parameters."""
    parameters = dict(network.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if not frozen:
        try:
            gradients = torch.autograd.grad(network(images).sum(), list(parameters.values()), allow_unused=True)
        except RuntimeError as error:
            raise UserError(
                f"model.module: {kind} cannot be differentiated ({first_line(error).split(':')[0]}); "
                "overwrite nothing in place that is still needed"
            ) from error
        frozen = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if frozen:
        name = frozen[0].removeprefix("encoder.")
        raise UserError(
            f"model.module: {name} of {kind} gets no gradient; it must be trained and used, or not be there"
        )
