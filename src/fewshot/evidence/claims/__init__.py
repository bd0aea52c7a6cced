"""One file per claim of the paper, and the list of them in the order of the page; a new one is a file and its entry.

Each file has

    measure(model)           what it adds to evidence.json, {key: numbers}
    section(evidence)        its section of the page, where evidence is all of evidence.json
    draw(evidence, shown)    the section's picture, if it has one
    verdict(evidence)        {what: page.Verdict}
"""

from fewshot.evidence.claims import (
    accuracy,
    cross_task,
    frozen_encoder,
    identities,
    label_orders,
    limits,
    memory,
    motion,
    motivating_example,
    noise,
    outer_step,
    prototypes,
    similarity,
)

CLAIMS = [
    *(motivating_example, outer_step, motion, noise, similarity, memory, prototypes, accuracy),
    *(label_orders, cross_task, frozen_encoder, identities, limits),
]
