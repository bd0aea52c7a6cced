"""Independent arithmetic: what the program computes, written out in NumPy or plainly for one task.

theta of the one-layer tanh encoder and its linear head: A (d, p), a (d,), W (K, d), b (K,). Second order is the complex
step derivative Im f(x + ih) / h of inner loop and query loss together, exact to rounding, with no differentiation.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """The arguments of `closed_form_gradients`."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    weight: Tensor
    bias: Tensor | None


def softmax(logits):
    power = np.exp(logits - logits.real.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


def np_logits(theta, x):
    A, a, W, b = theta
    return np.tanh(x @ A.T + a) @ W.T + b


def np_gradient(theta, x, labels, loss="cross_entropy"):
    """Of the mean cross entropy, or of half the squared distance to the one-hot labels, summed over images."""
    A, a, W, _ = theta
    phi, logits, T = np.tanh(x @ A.T + a), np_logits(theta, x), np.eye(len(W))[labels]
    E = (softmax(logits) - T) / len(x) if loss == "cross_entropy" else logits - T
    inside = (E @ W) * (1 - phi**2)
    return inside.T @ x, inside.sum(0), E.T @ phi, E.sum(0)


def np_adapted(theta, x, labels, inner_lr, steps, loss="cross_entropy"):
    for _ in range(steps):
        theta = tuple(p - inner_lr * g for p, g in zip(theta, np_gradient(theta, x, labels, loss), strict=True))
    return theta


def np_loss(theta, x, labels, loss="cross_entropy"):
    logits = np_logits(theta, x)
    if loss == "mse":
        return ((logits - np.eye(logits.shape[1])[labels]) ** 2).sum() / 2
    return -np.log(softmax(logits)[np.arange(len(x)), labels]).mean()


def np_accuracy(theta, x, labels):
    return (np_logits(theta, x).argmax(1) == labels).mean()


def complex_step(function, theta, h=1e-30):
    derivative = []
    for place, parameter in enumerate(theta):
        derivative.append(np.empty_like(parameter))
        for index in np.ndindex(parameter.shape):
            moved = [p.astype(complex) for p in theta]
            moved[place][index] += 1j * h
            derivative[-1][index] = function(tuple(moved)).imag / h
    return tuple(derivative)


def np_tasks(tasks):
    for support, support_labels, query, query_labels in zip(*tasks, strict=True):
        yield support.flatten(1).numpy(), support_labels.numpy(), query.flatten(1).numpy(), query_labels.numpy()


def np_theta(network):
    return tuple(p.detach().numpy().copy() for p in network.parameters())


def np_meta_gradient(network, tasks, *, inner_lr, inner_steps, first_order, loss="cross_entropy"):
    """Mean over tasks, and the loss and accuracy of each."""
    theta, gradients, losses, accuracies = np_theta(network), [], [], []
    for x, labels, query, query_labels in np_tasks(tasks):
        adapted = np_adapted(theta, x, labels, inner_lr, inner_steps, loss)
        if first_order:
            gradients.append(np_gradient(adapted, query, query_labels, loss))
        else:

            def through_the_inner_loop(theta, x=x, labels=labels, query=query, query_labels=query_labels):
                return np_loss(np_adapted(theta, x, labels, inner_lr, inner_steps, loss), query, query_labels, loss)

            gradients.append(complex_step(through_the_inner_loop, theta))
        losses.append(np_loss(adapted, query, query_labels, loss))
        accuracies.append(np_accuracy(adapted, query, query_labels))
    mean = [np.mean(of_tasks, axis=0) for of_tasks in zip(*gradients, strict=True)]
    return dict(zip(dict(network.named_parameters()), mean, strict=True)), losses, accuracies


def np_prototypes(theta, x, labels):
    A, a, W, _ = theta
    phi = np.tanh(x @ A.T + a)
    c = np.stack([phi[labels == k].mean(0) for k in range(len(W))])
    return A, a, 2 * c, -(c**2).sum(1)


def np_prototypical_network(network, tasks, distance, temperature, first_order):
    """The encoder's gradient, mean over tasks, and the loss of each; in first order the prototypes are constants."""
    theta, gradients, losses = np_theta(network), [], []
    for x, labels, query, query_labels in np_tasks(tasks):

        def features(at, images):
            phi = np.tanh(images @ at[0].T + at[1])
            return phi / np.sqrt((phi * phi).sum(1, keepdims=True)) if distance == "cosine" else phi

        def prototypes(at, x=x, labels=labels, features=features):
            phi = features(at, x)
            c = np.stack([phi[labels == k].mean(0) for k in range(labels.max() + 1)])
            return c / np.sqrt((c * c).sum(1, keepdims=True)) if distance == "cosine" else c

        def loss(at, prototypes=prototypes, features=features, query=query, query_labels=query_labels):
            c, phi = prototypes(theta if first_order else at), features(at, query)
            scores = np.array([[-((q - k) @ (q - k)) if distance == "squared" else q @ k for k in c] for q in phi])
            return -np.log(softmax(scores / temperature)[np.arange(len(query)), query_labels]).mean()

        gradients.append(complex_step(loss, theta))
        losses.append(loss(theta))
    names = [name for name, _ in network.encoder.named_parameters()]
    mean = [np.mean(of_tasks, axis=0) for of_tasks in zip(*gradients, strict=True)]
    return {f"encoder.{name}": gradient for name, gradient in zip(names, mean, strict=False)}, losses


def np_steps(theta, etas, task, steps, prototypes, constants=None):
    """theta_0 .. theta_N and the inner gradients, which are given where they are taken for constants."""
    x, labels, *_ = task
    at = np_prototypes(theta, x, labels) if prototypes else theta
    passed, gradients = [at], []
    for step in range(steps):
        gradients.append(np_gradient(at, x, labels) if constants is None else constants[step])
        at = tuple(p - eta * g for p, eta, g in zip(at, etas, gradients[-1], strict=True))
        passed.append(at)
    return passed, gradients


def np_etas(network, inner_lr, adapted):
    """eta for A, a, W, b; 0 for what does not adapt."""
    theta = np_theta(network)
    places = {"all": range(4), "encoder": range(2), "head": range(2, 4)}[adapted]
    rates = [inner_lr] * 4 if isinstance(inner_lr, float) else [eta.detach().numpy() for eta in inner_lr]
    etas = [np.zeros_like(p) for p in theta]
    for place, eta in zip(places, rates, strict=False):
        etas[place] = etas[place] + eta
    return tuple(etas), places


def np_family(network, tasks, *, inner_lr, inner_steps, first_order, adapted="all", head="learned", step_losses=None):
    """Mean over the tasks of the complex step derivatives by theta and by what adapts' etas."""
    v = [0.0] * (inner_steps - 1) + [1.0] if step_losses is None else step_losses.tolist()
    theta, (etas, places), gradients = np_theta(network), np_etas(network, inner_lr, adapted), []
    prototypes = head == "prototypes"
    for task in np_tasks(tasks):
        constants = np_steps(theta, etas, task, inner_steps, prototypes)[1] if first_order else None

        def outer(both, task=task, constants=constants):
            passed, _ = np_steps(both[:4], both[4:], task, inner_steps, prototypes, constants)
            return sum(weight * np_loss(at, *task[2:]) for weight, at in zip(v, passed[1:], strict=True))

        gradients.append(complex_step(outer, (*theta, *etas)))
    mean = [np.mean(of_tasks, axis=0) for of_tasks in zip(*gradients, strict=True)]
    return dict(zip(dict(network.named_parameters()), mean[:4], strict=True)), [mean[4 + place] for place in places]


def head_only_gradient(network, tasks, *, inner_lr, first_order):
    """Encoder gradient where only the head is adapted, by W_1 = eta/N_s (T_S - 1/K)^T Phi_S written out."""
    network.zero_grad(set_to_none=True)
    for support, support_labels, query, query_labels in zip(*tasks, strict=True):
        ways = network.head.out_features
        step = inner_lr / len(support) * (F.one_hot(support_labels, ways).double() - 1 / ways).T
        w, b = step @ network.encoder(support), step.sum(1)
        logits = network.encoder(query) @ (w.detach() if first_order else w).T + b
        (F.cross_entropy(logits, query_labels) / len(tasks.support)).backward()
    return {name: p.grad.clone() for name, p in network.encoder.named_parameters()}


# What evidence measures, pair by pair


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def by_hand(network, task, eta):
    """One inner step of the head on one task, written out pair by pair."""
    with torch.no_grad():
        S, Q = (network.encoder(x).numpy() for x in (task.support, task.query))
    s_labels, q_labels = task.support_labels.numpy(), task.query_labels.numpy()
    w, b = network.head.weight.detach().numpy(), network.head.bias.detach().numpy()
    one_hot = np.eye(len(w))
    P = softmax(S @ w.T + b)
    step = eta / len(S) * (one_hot[s_labels] - P)
    w1, b1 = w + step.T @ S, b + step.sum(0)
    q = softmax(Q @ w1.T + b1)
    contrastive, interference, wrong = np.zeros_like(Q), np.zeros_like(Q), []
    for i, u in enumerate(q_labels):
        interference[i] = (q[i] - one_hot[u]) @ w / len(Q)
        for j, t in enumerate(s_labels):
            c = q[i] @ P[j] - P[j][u] - q[i][t] + (t == u)
            contrastive[i] -= eta / len(S) / len(Q) * c * S[j]
            wrong.append((c > 0) != (t == u))
    pairs = {"same": [], "other": [], "same_queries": [], "other_queries": []}
    for i, u in enumerate(q_labels):
        for j, t in enumerate(s_labels):
            pairs["same" if t == u else "other"].append(cosine(Q[i], S[j]))
        for k, v in enumerate(q_labels):
            if i != k:
                pairs["same_queries" if v == u else "other_queries"].append(cosine(Q[i], Q[k]))
    E_Q = (q - one_hot[q_labels]).T / len(Q)
    head_gradient, w0 = (np.column_stack(both) for both in ((E_Q @ Q, E_Q.sum(1)), (w, b)))
    w0 = w0 - w0.mean(0)
    return {
        "interference_norm": np.linalg.norm(interference),
        "contrastive_norm": np.linalg.norm(contrastive),
        "wrong_sign": np.mean(wrong),
        **{f"cosine_{name}": np.mean(values) for name, values in pairs.items()},
        "head_norm": np.linalg.norm(w0),
        "cross_task": cosine(w0.ravel(), head_gradient.ravel()),
    }


# The inner loop of the head alone and its query loss, for one task, differentiated by torch


def support_loss(logits, labels, loss):
    if loss == "mse":
        return (logits - F.one_hot(labels, logits.shape[1])).square().sum() / 2
    return F.cross_entropy(logits, labels)


def linear(x, head):
    return F.linear(x, *head)


def adapted(x, labels, head, *, inner_lr, inner_steps, loss):
    """The heads W_0 .. W_N, each (weight,) or (weight, bias), as functions of x and the first."""
    heads = [head]
    for _ in range(inner_steps):
        gradients = torch.autograd.grad(support_loss(linear(x, head), labels, loss), head, create_graph=True)
        head = tuple(p - inner_lr * g for p, g in zip(head, gradients, strict=True))
        heads.append(head)
    return heads


def differentiated(x, labels, query, query_labels, weight, bias, *, first_order, loss, **knobs):
    """loss and the gradients with respect to query features, support features, weight and bias of one task."""
    x, query, *head = (tensor.clone().requires_grad_() for tensor in (x, query, weight, bias) if tensor is not None)
    last = adapted(x, labels, tuple(head), loss=loss, **knobs)[-1]
    if first_order:
        last = head = tuple(p.detach().requires_grad_() for p in last)
    value = support_loss(linear(query, last), query_labels, loss)
    gradients = torch.autograd.grad(value, [query, x, *head], allow_unused=True, materialize_grads=True)
    return value.detach(), *gradients


def np_split_adapting_all(theta, task, eta, steps):
    """Interference and contrastive term (Q, d) where everything adapts, pair by pair."""
    x, labels, query, query_labels = task
    thetas = [np_adapted(theta, x, labels, eta, step) for step in range(steps + 1)]
    features = [np.tanh(x @ A.T + a) for A, a, *_ in thetas]
    P = [softmax(np_logits(at, x)) for at in thetas]
    q, W_0 = softmax(np_logits(thetas[-1], query)), theta[2]
    interference, contrastive = (np.zeros((len(query), W_0.shape[1])) for _ in range(2))
    for i, u in enumerate(query_labels):
        interference[i] = (q[i] @ W_0 - W_0[u]) / len(query)
        for p in range(steps):
            for j, t in enumerate(labels):
                c = q[i] @ P[p][j] - P[p][j][u] - q[i][t] + (t == u)
                contrastive[i] -= eta / (len(x) * len(query)) * c * features[p][j]
    return interference, contrastive


# Inner loops and outer gradients of algorithms that are one file each


def np_momentum(eta, mu):
    def step(theta, gradient, v):
        v = gradient if v is None else tuple(mu * before + g for before, g in zip(v, gradient, strict=True))
        return tuple(p - eta * moved for p, moved in zip(theta, v, strict=True)), v

    return step


def np_adam(eta, beta1, beta2, eps):
    def step(theta, gradient, state):
        n, first, second = state or (0, *(tuple(np.zeros_like(p) for p in theta) for _ in range(2)))
        first = tuple(beta1 * m + (1 - beta1) * g for m, g in zip(first, gradient, strict=True))
        second = tuple(beta2 * v + (1 - beta2) * g**2 for v, g in zip(second, gradient, strict=True))
        m_hat, v_hat = 1 / (1 - beta1 ** (n + 1)), 1 / (1 - beta2 ** (n + 1))
        moved = (p - eta * m * m_hat / (np.sqrt(v * v_hat) + eps) for p, m, v in zip(theta, first, second, strict=True))
        return tuple(moved), (n + 1, first, second)

    return step


def np_proximal(eta, strength):
    """Gradient descent on L + strength/2 |theta_n - theta_0|^2."""

    def step(theta, gradient, start):
        start = start or theta
        pulled = (g + strength * (p - s) for g, p, s in zip(gradient, theta, start, strict=True))
        return tuple(p - eta * g for p, g in zip(theta, pulled, strict=True)), start

    return step


def np_stepped(theta, x, labels, steps, step):
    state = None
    for _ in range(steps):
        theta, state = step(theta, np_gradient(theta, x, labels), state)
    return theta


def np_through(network, tasks, steps, step, first_order):
    """The outer gradient where `step` is the inner step, a mean over tasks, and the query loss of each."""
    theta, of_tasks, losses = np_theta(network), [], []
    for x, labels, *query in np_tasks(tasks):

        def outer(at, x=x, labels=labels, query=query):
            return np_loss(np_stepped(at, x, labels, steps, step), *query)

        adapted = np_stepped(theta, x, labels, steps, step)
        of_tasks.append(np_gradient(adapted, *query) if first_order else complex_step(outer, theta))
        losses.append(np_loss(adapted, *query))
    return by_name(network, of_tasks), losses


def by_name(network, of_tasks):
    mean = [np.mean(parts, axis=0) for parts in zip(*of_tasks, strict=True)]
    return dict(zip(dict(network.named_parameters()), mean, strict=True))


def np_vector(parts):
    return np.concatenate([part.ravel() for part in parts])


def np_parts(vector, theta):
    ends = np.cumsum([p.size for p in theta])
    return tuple(part.reshape(p.shape) for part, p in zip(np.split(vector, ends[:-1]), theta, strict=True))


def np_hessian(theta, x, labels, h=1e-30):
    start = np_vector(theta)
    moved = start + 1j * h * np.eye(len(start))
    return np.array([np_vector(np_gradient(np_parts(row, theta), x, labels)).imag / h for row in moved])


def np_conjugate_gradients(A, b, steps):
    """As the code that Rajeswaran et al. released has it (cg_solve), without its early end."""
    x, r = np.zeros_like(b), b.copy()
    p = r.copy()
    for _ in range(steps):
        rdotr, Ap = r @ r, A @ p
        alpha = rdotr / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        p = r + (r @ r) / rdotr * p
    return x


# What BatchNorm makes of images, by the moments of some of them


def conv4_logits(theta, images, by, norm="batch"):
    """conv4_strided, layer by layer: each normalises all images by the moments of images[by], or as `norm` says."""
    x = images
    for place, stride in ((0, 2), (3, 2), (6, 2), (9, 1)):
        x = F.relu(F.conv2d(x, theta[f"encoder.{place}.weight"], theta[f"encoder.{place}.bias"], stride))
        if norm == "group":
            x = group_norm_by_hand(x, *(theta[f"encoder.{place + 2}.{p}"] for p in TASK_NORM[:2]), groups=2)
            continue
        if norm == "task":
            x = task_norm_by_hand(x, by, *(theta[f"encoder.{place + 2}.{p}"] for p in TASK_NORM))
            continue
        channels = []
        for c in range(x.shape[1]):
            numbers = x[by, c].flatten()
            mean = numbers.sum() / len(numbers)
            variance = ((numbers - mean) ** 2).sum() / len(numbers)
            z = (x[:, c] - mean) / torch.sqrt(variance + 1e-5)
            channels.append(theta[f"encoder.{place + 2}.weight"][c] * z + theta[f"encoder.{place + 2}.bias"][c])
        x = torch.stack(channels, 1)
    return x.flatten(1) @ theta["head.weight"].T + theta["head.bias"]


TASK_NORM = ("weight", "bias", "scale", "offset")


def task_norm_by_hand(x, support, weight, bias, scale, offset):
    """Image by image and channel by channel; support: which images are."""
    alpha = 1 / (1 + torch.exp(-(scale * len(x[support]) + offset)))
    images = []
    for image in x:
        channels = []
        for c, own in enumerate(image):
            both = x[support][:, c]
            mu_S, mu_x = both.sum() / both.numel(), own.sum() / own.numel()
            var_S, var_x = ((both - mu_S) ** 2).sum() / both.numel(), ((own - mu_x) ** 2).sum() / own.numel()
            mu = alpha * mu_S + (1 - alpha) * mu_x
            var = alpha * (var_S + (mu_S - mu) ** 2) + (1 - alpha) * (var_x + (mu_x - mu) ** 2)
            channels.append(weight[c] * (own - mu) / torch.sqrt(var + 1e-5) + bias[c])
        images.append(torch.stack(channels))
    return torch.stack(images)


def group_norm_by_hand(x, weight, bias, groups):
    """Image by image and group by group."""
    images = []
    for image in x:
        normalised = []
        for group in image.chunk(groups):
            mean = group.sum() / group.numel()
            normalised.append((group - mean) / torch.sqrt(((group - mean) ** 2).sum() / group.numel() + 1e-5))
        images.append(weight[:, None, None] * torch.cat(normalised) + bias[:, None, None])
    return torch.stack(images)


def conv4_gradient(network, tasks, inner_lr, steps, first_order, norm):
    """The outer gradient of conv4_strided by name, a mean over the tasks."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    total = 0
    for support, labels, query, query_labels in zip(*tasks, strict=True):
        theta, S = leaves, slice(len(support))
        for _ in range(steps):
            loss = F.cross_entropy(conv4_logits(theta, support, S, norm), labels)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            theta = {name: p - inner_lr * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        logits = conv4_logits(theta, torch.cat([support, query]), S, norm)[len(support) :]
        total = total + F.cross_entropy(logits, query_labels) / len(tasks.support)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def logits_by_statistics(network, task, inner_lr, steps, zeroing, statistics):
    """Of the queries after each inner step, (T + 1, Q, K)."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    if zeroing:
        theta |= {name: torch.zeros_like(theta[name]).requires_grad_() for name in ("head.weight", "head.bias")}
    S, everything, logits = len(task.support), slice(None), []
    for step in range(steps + 1):
        if step:
            loss = F.cross_entropy(conv4_logits(theta, task.support, everything), task.support_labels)
            moved = zip(theta.items(), torch.autograd.grad(loss, list(theta.values())), strict=True)
            theta = {name: (p - inner_lr * g).detach().requires_grad_() for (name, p), g in moved}
        if statistics == "task":
            logits.append(conv4_logits(theta, task.query, everything))
        elif statistics == "support":
            logits.append(conv4_logits(theta, torch.cat([task.support, task.query]), slice(S))[S:])
        else:
            pairs = [torch.cat([task.support, query[None]]) for query in task.query]
            logits.append(torch.stack([conv4_logits(theta, images, everything)[S] for images in pairs]))
    return torch.stack(logits).detach()
