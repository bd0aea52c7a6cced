"""What the theory speaks of, measured on a model (docs/method.md).

Shapes: B tasks, S support and Q query images per task, d features, K ways, N inner steps.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.data.task import Task
from fewshot.models.network import Network
from fewshot.theory.closed_forms import adapt_head
from fewshot.theory.features import Features, centred, mean_cosines


@torch.no_grad()
def probes(network: Network, batches: Iterable[Task], *, inner_lr: float, inner_steps: int) -> dict[str, float]:
    """Means over the tasks, on the features of the unadapted encoder (EFIL: the head alone adapts); changes nothing.

    interference_norm, contrastive_norm: of the two terms of the queries' gradient (2.4).
    wrong_sign: share of the coefficients sum_p c^(p)_qs that draw a query to another class; none draws it away from its
    own (2.12).
    cosine_same, cosine_other: mean cosine similarity of query and support features of the same class and of others;
    cosine_same_queries, cosine_other_queries: of two queries.
    head_norm: of the initial head w0, weights and bias, less what all classes share, which has no effect.
    cross_task: cosine of that and a task's gradient of the head (2.7); 0 where nothing is left.
    """
    sums: dict[str, Tensor] = {}
    tasks = 0
    for batch in batches:
        features = Features.of(network, batch)
        with torch.autocast(features.query.device.type, enabled=False):  # of eight bits a coefficient has no sure sign
            probed = _probe(features, inner_lr=inner_lr, inner_steps=inner_steps)
        sums = {name: sums.get(name, 0) + values.double().sum() for name, values in probed.items()}
        tasks += len(batch.support)
    return {name: round((total / tasks).item(), 6) for name, total in sums.items()}


def _probe(features: Features, inner_lr: float, inner_steps: int) -> dict[str, Tensor]:
    """{name: (B,)}"""
    adapted = adapt_head(features, inner_lr=inner_lr, inner_steps=inner_steps)
    gradients, c = adapted.gradients(first_order=True), adapted.coefficients().sum(0)  # c (B, Q, S)
    phi_S, phi_Q, w, b = features.support, features.query, features.weight, features.bias
    with_query = features.query_labels[:, :, None] == features.query_labels[:, None]  # (B, Q, Q)
    w0 = centred(w if b is None else torch.cat([w, b[:, None]], dim=1))
    biases = [] if gradients.bias is None else [gradients.bias.unsqueeze(-1)]
    to_w0 = torch.cat([gradients.weight, *biases], dim=-1)
    same, other = mean_cosines(phi_Q, phi_S, features.same_class())
    not_itself = ~torch.eye(phi_Q.shape[1], dtype=torch.bool, device=phi_Q.device)
    same_queries, other_queries = mean_cosines(phi_Q, phi_Q, with_query, not_itself)
    return {
        "interference_norm": gradients.interference.flatten(1).norm(dim=1),
        "contrastive_norm": gradients.contrastive.flatten(1).norm(dim=1),
        "wrong_sign": features.wrong_signs(c).double().mean((1, 2)),
        "cosine_same": same,
        "cosine_other": other,
        "cosine_same_queries": same_queries,
        "cosine_other_queries": other_queries,
        "head_norm": w0.norm().expand(len(c)),
        "cross_task": F.cosine_similarity(w0.flatten().expand(len(c), -1), to_w0.flatten(1)),
    }
