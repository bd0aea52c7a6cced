"""The same meta-step by other libraries, each written as its own public MAML example writes it.

Those in torch add the mean outer gradient over the tasks to the .grad of the network's parameters. So do the two
engines, which are called here with the same knobs. A loop differs from its example in two things alone: the tasks come
from a Task, and where the example has no switch for first order, the gradients are detached in the way that its library
offers.
"""

import os
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.batched import engine, side_by_side
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop


def sequential(network: nn.Module, tasks: Task, **fields: Any):
    """fields: of the InnerLoop."""
    from fewshot.maml.sequential import meta_gradient

    return meta_gradient(network, tasks, InnerLoop(**fields))


def batched(network: nn.Module, tasks: Task, tasks_at_once: int | None = None, execute: Any = None, **fields: Any):
    """fields: of the InnerLoop."""
    loop = InnerLoop(**fields)
    return engine.meta_gradient(network, tasks, loop, tasks_at_once=tasks_at_once, execute=execute)


def learn2learn_loop(network: nn.Module, tasks: Task, *, inner_lr: float, inner_steps: int, first_order: bool):
    """learn2learn's examples/vision/maml_omniglot.py and maml_miniimagenet.py, without their meta-validation task."""
    from learn2learn.algorithms import MAML

    def accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
        predictions = predictions.argmax(dim=1).view(targets.shape)
        return (predictions == targets).sum().float() / targets.size(0)

    def fast_adapt(learner: MAML, task: Task) -> tuple[Tensor, Tensor]:
        for _ in range(inner_steps):
            learner.adapt(loss(learner(task.support), task.support_labels))
        predictions = learner(task.query)
        return loss(predictions, task.query_labels), accuracy(predictions, task.query_labels)

    maml, loss = MAML(network, lr=inner_lr, first_order=first_order), nn.CrossEntropyLoss(reduction="mean")
    errors, accuracies = [], []
    for task in _single_tasks(tasks):
        learner = maml.clone()
        evaluation_error, evaluation_accuracy = fast_adapt(learner, task)
        evaluation_error.backward()
        errors.append(evaluation_error.item())  # on a GPU this waits for the task, as in the examples
        accuracies.append(evaluation_accuracy.item())
    for p in maml.parameters():
        p.grad.data.mul_(1.0 / len(tasks.support))
    return torch.tensor(errors), torch.tensor(accuracies)


def im2col(network: nn.Module, tasks: Task, **knobs: Any):
    """The batched engine with its convolutions as im2col and one matrix product per task, instead of cuDNN's groups."""

    def convolution(tasks: int, x: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        stride, padding, dilation, _ = geometry
        columns = F.unfold(x, weight.shape[-2:], dilation, padding, stride).unflatten(
            1, (tasks, -1)
        )  # (I, B, C*k*k, L)
        y = weight.flatten(2) @ columns + bias[..., None]  # (B, O, C*k*k) @ -> (I, B, O, L)
        height = (x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[-2] - 1) - 1) // stride[0] + 1
        return y.flatten(1, 2).unflatten(2, (height, -1))

    with mock.patch.dict(side_by_side.OWN, {F.conv2d: convolution}):
        return batched(network, tasks, **knobs)


def higher_loop(network: nn.Module, tasks: Task, *, inner_lr: float, inner_steps: int, first_order: bool):
    """higher's examples/maml-omniglot.py; first order by the gradient callback of its differentiable optimiser."""
    import higher

    optimizer = torch.optim.SGD(network.parameters(), lr=inner_lr)
    detach = {"grad_callback": lambda gradients: [g.detach() for g in gradients]} if first_order else {}
    losses, accuracies = [], []
    for task in _single_tasks(tasks):
        with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (learner, inner):
            for _ in range(inner_steps):
                inner.step(F.cross_entropy(learner(task.support), task.support_labels), **detach)
            logits = learner(task.query)
            loss = F.cross_entropy(logits, task.query_labels)
            losses.append(loss.detach())
            accuracies.append((logits.argmax(dim=1) == task.query_labels).sum().item() / len(logits))
            (loss / len(tasks.support)).backward()
    return torch.stack(losses), torch.tensor(accuracies)


def torchopt_loop(network: nn.Module, tasks: Task, *, inner_lr: float, inner_steps: int, first_order: bool):
    """TorchOpt's examples/few-shot/maml_omniglot.py; first order by a gradient transformation before its SGD."""
    import torchopt

    def detach(updates, state, *, params=None, inplace=True):
        return torchopt.pytree.tree_map(Tensor.detach, updates), state

    if first_order:
        cut = torchopt.base.GradientTransformation(lambda params: torchopt.base.EmptyState(), detach)
        inner = torchopt.MetaOptimizer(network, torchopt.chain(cut, torchopt.sgd(inner_lr, moment_requires_grad=True)))
    else:
        inner = torchopt.MetaSGD(network, lr=inner_lr)
    initial = torchopt.extract_state_dict(network, by="reference", detach_buffers=True)
    inner_initial = torchopt.extract_state_dict(inner, by="reference")
    losses, accuracies = [], []
    for task in _single_tasks(tasks):
        for _ in range(inner_steps):
            inner.step(F.cross_entropy(network(task.support), task.support_labels))
        logits = network(task.query)
        losses.append(F.cross_entropy(logits, task.query_labels))
        accuracies.append((logits.argmax(dim=1) == task.query_labels).float().mean().item())
        torchopt.recover_state_dict(network, initial)
        torchopt.recover_state_dict(inner, inner_initial)
    losses = torch.stack(losses)
    losses.mean().backward()  # every task's graph at a time, as in the example
    return losses.detach(), torch.tensor(accuracies)


def _single_tasks(tasks: Task) -> list[Task]:
    return [Task(*fields) for fields in zip(*tasks, strict=True)]


class Jax:
    """The same network and meta-step in JAX, from the same initial weights: jit, and on a GPU vmap over the tasks.

    On a CPU the tasks follow each other through one compiled function: vmap makes grouped convolutions of a task's
    convolutions, which XLA runs many times slower there. XLA's threads are its own, as many as the process may use
    cores, whatever torch's number is. Weights and tasks are JAX's arrays, put on its device once.
    """

    def __init__(
        self, network: nn.Module, tasks: Task, *, inner_lr: float, inner_steps: int, first_order: bool, tf32: bool
    ) -> None:
        on_gpu = tasks.support.device.type == "cuda"
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the GPU's memory to torch as well
        os.environ.setdefault("JAX_PLATFORMS", "cuda" if on_gpu else "cpu")
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_default_matmul_precision", "default" if tf32 else "highest")

        def support_loss(theta, task: Task):
            return _jax_cross_entropy(_jax_logits(network, theta, task.support), task.support_labels)

        def query_loss(theta, task: Task):
            for _ in range(inner_steps):
                gradients = jax.grad(support_loss)(theta, task)
                if first_order:
                    gradients = jax.lax.stop_gradient(gradients)
                theta = jax.tree.map(lambda p, g: p - inner_lr * g, theta, gradients)
            logits = _jax_logits(network, theta, task.query)
            loss = _jax_cross_entropy(logits, task.query_labels)
            return loss, (loss, (logits.argmax(1) == task.query_labels).mean())

        per_task = jax.grad(query_loss, has_aux=True)

        def all_tasks(theta, tasks: Task):
            gradients, scores = jax.vmap(per_task, in_axes=(None, 0))(theta, tasks)
            return jax.tree.map(lambda g: g.mean(0), gradients), scores

        def one_more(total, theta, task: Task):
            gradients, scores = per_task(theta, task)
            return jax.tree.map(lambda t, g: t + g / len(tasks.support), total, gradients), scores

        theta = {name: jnp.asarray(p.detach().cpu().numpy()) for name, p in network.named_parameters()}
        arrays = [Task(*(jnp.asarray(field.cpu().numpy()) for field in task)) for task in _single_tasks(tasks)]
        if on_gpu:
            together = jax.tree.map(lambda *fields: jnp.stack(fields), *arrays)
            self._compiled = jax.jit(all_tasks).lower(theta, together).compile()
        else:
            zeros = jax.tree.map(jnp.zeros_like, theta)
            self._compiled = jax.jit(one_more).lower(zeros, theta, arrays[0]).compile()

        def step():
            if on_gpu:
                return self._compiled(theta, together)
            total, scores = zeros, []
            for task in arrays:
                total, score = self._compiled(total, theta, task)
                scores.append(score)
            return total, scores

        self._step = lambda: jax.block_until_ready(step())

    def __call__(self) -> None:
        self._gradients, _ = self._step()

    def gradients(self) -> dict[str, Tensor]:
        """The outer gradient of the last step, by the parameters' names in torch."""
        return {name: torch.from_numpy(np.array(g)) for name, g in self._gradients.items()}

    @property
    def temporary_bytes(self) -> int:
        """What XLA set aside for the compiled step beside its arguments and results."""
        return self._compiled.memory_analysis().temp_size_in_bytes


def _jax_logits(network: nn.Module, theta, x):
    """The layers of fewshot.models.Network, read off the torch network: (S, C, H, W) -> (S, K)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    for place, layer in enumerate(network.encoder):
        weight, bias = (theta.get(f"encoder.{place}.{name}") for name in ("weight", "bias"))
        if isinstance(layer, nn.Conv2d):
            x = lax.conv_general_dilated(x, weight, layer.stride, [(p, p) for p in layer.padding]) + bias[:, None, None]
        elif isinstance(layer, nn.ReLU):
            x = jax.nn.relu(x)  # whose gradient at 0 is 0 as torch's; that of maximum is 1/2
        elif isinstance(layer, nn.BatchNorm2d):
            mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)  # biased, as torch's
            x = (x - mean) * lax.rsqrt(variance + layer.eps) * weight[:, None, None] + bias[:, None, None]
        elif isinstance(layer, nn.MaxPool2d):
            window = (1, 1, layer.kernel_size, layer.kernel_size)
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
        elif isinstance(layer, nn.Flatten):
            x = x.reshape(len(x), -1)
        else:
            raise TypeError(f"no JAX version of {layer}")
    return x @ theta["head.weight"].T + theta["head.bias"]


def _jax_cross_entropy(logits, labels):
    import jax.numpy as jnp
    from jax.nn import log_softmax

    return -jnp.take_along_axis(log_softmax(logits), labels[:, None], axis=1).mean()
