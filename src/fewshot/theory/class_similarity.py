"""How alike the classes of a task are to an encoder (docs/method.md, section 5).

Shapes: S support and Q query images of one task, K ways, d features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.data.task import Task
from fewshot.models.network import Network


@torch.no_grad()
def class_similarities(network: Network, task: Task) -> dict[str, list[list[float]]]:
    """Mean cosine similarity of the features of every two classes: {"query_support": K x K, "query_query": K x K}.

    Entry [u][t] is the mean over the queries of class u paired with the support images, or with the other queries, of
    class t. The encoder is unadapted and unchanged; support and queries pass it one after the other, as in training.
    """
    of_S, of_Q = (F.one_hot(labels).double() for labels in (task.support_labels, task.query_labels))  # (S, K), (Q, K)
    phi_S, phi_Q = (F.normalize(network.encoder(images).double()) for images in (task.support, task.query))
    not_itself = 1 - torch.eye(len(phi_Q), dtype=torch.double, device=phi_Q.device)
    return {
        "query_support": _means(phi_Q @ phi_S.mT, torch.ones(len(phi_Q), len(phi_S)).to(of_S), of_Q, of_S),
        "query_query": _means(phi_Q @ phi_Q.mT, not_itself, of_Q, of_Q),
    }


def _means(similarity: Tensor, counted: Tensor, of_first: Tensor, of_second: Tensor) -> list[list[float]]:
    """Mean of similarity (I, J) over the counted pairs of each two classes; of_first (I, K), of_second (J, K)."""
    sums, pairs = (of_first.mT @ each @ of_second for each in (similarity * counted, counted))
    return [[round(value, 6) for value in row] for row in (sums / pairs).tolist()]
