"""The algorithm as a value: how one task turns theta into theta_n.

It imports no torch, because checks, sweeps and model cards ask it too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from fewshot.errors import UserError, shown

ADAPTED, HEADS = ("all", "head", "encoder"), ("learned", "shared", "prototypes", "own")
DISTANCES = {"dot": "dot product", "squared": "squared distance", "cosine": "cosine"}
LOSSES = ("cross_entropy", "mse")
THEORY = "a learned, adapting head, a single inner_lr and cross entropy"
TOP = ("inner_steps", "inner_lr", "loss", "recompute_steps")  # fields here that are top-level knobs, not knobs of algo
ORDERS = {True: "first order", False: "second order"}
Tensors = dict[str, Any]  # parameters, or what goes with them, by their names
Loss = Callable[[Tensors], Any]


@dataclass(frozen=True)
class InnerLoop:
    """How one task turns theta into theta_n. Each algorithm of the family is one setting of these fields:

    MAML    first_order=False   ANIL  adapted="head"     ProtoMAML    head="prototypes"  MAML++ (MSL)  step_losses=60
    FOMAML  first_order=True    BOIL  adapted="encoder"  UnicornMAML  head="shared"      Meta-SGD      learned_inner_lr

    A prototypical network is ProtoMAML without inner steps, with one of DISTANCES.
    An algorithm of one's own is a class that derives from this one and overrides start, update, outer_gradient or, with
    algo.head=own, initial_head. algo._target_ names it, and its fields are knobs of algo. See docs/algorithms.md.
    """

    needs: ClassVar[Mapping[str, Any]] = {}  # the only values of fields with which an algorithm of one's own works
    measures: ClassVar[tuple[str, ...]] = ()  # what its outer_gradient gives besides, of each task; in metrics.csv

    inner_steps: int  # N
    inner_lr: float  # eta; if eta is learned, the value that it starts from
    first_order: bool  # True: d theta_n / d theta is taken to be 1
    zeroing: bool = False  # w <- 0 whenever the loop begins
    adapted: str = "all"  # one of ADAPTED
    head: str = "learned"  # where the head of each task starts; shared: one learned row for all classes
    distance: str | None = None  # of a prototypical network, from query to prototype; None: it is none
    temperature: float | None = None  # of a prototypical network; None: the distance's usual one
    loss: str = "cross_entropy"  # of the inner loop and of the queries
    step_losses: int | None = None  # outer updates until only the last step's query loss counts; None: from the start
    learned_inner_lr: bool = False  # one eta for every number that adapts
    noise: bool | None = None  # a term of the explicit loss, which takes MAML's place; None: MAML
    interference: bool | None = None  # likewise
    recompute_steps: bool = False  # second order in the memory of one inner step; the same numbers
    target: str | None = None  # algo._target_, which names a class of one's own; None: this class

    def __post_init__(self) -> None:
        for name, words in {"adapted": ADAPTED, "head": HEADS, "distance": (None, *DISTANCES), "loss": LOSSES}.items():
            if (word := getattr(self, name)) not in words:
                raise UserError(f"{name}={shown(word)}: must be one of {', '.join(map(shown, words))}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "InnerLoop":
        """The inner loop of a composed configuration, or of a stored one, which may lack the newer fields.

        Nothing that the configuration names is called: to train, call this of the class that algo._target_ names.

        Raises:
            UserError: a combination of fields with which nothing can be trained.
        """
        algo = config["algo"]
        stored = {name: algo[name] for field in fields(cls) if (name := field.name) in algo}
        stored |= {name: config[name] for name in TOP if name in config}
        if stored.get("distance"):  # a sweep may set steps for its other algorithms
            stored["inner_steps"] = 0
        zeroing = config.get("zeroing", algo["zeroing"])  # +zeroing=true|false overrides the algorithm's
        loop = cls(**stored | {"zeroing": zeroing, "target": algo.get("_target_")})
        loop._check()
        return loop

    def evaluation(self, steps: int, zeroing: bool) -> "InnerLoop":
        """The same adaptation to be evaluated; in first order, since the adapted parameters are the same.

        A prototypical network is the same after every step, and has no head to zero.
        """
        return self if self.distance else replace(self, inner_steps=steps, first_order=True, zeroing=zeroing)

    def _check(self) -> None:
        def only(why: str, **usual: Any) -> None:
            for name, value in usual.items():
                if getattr(self, name) != value:
                    prefix = "+" if name == "zeroing" else "algo." * (name not in TOP)
                    remedy = "leave it out" if value is None else f"use {shown(value)}"
                    raise UserError(f"{prefix}{name}={shown(getattr(self, name))}: {why}; {remedy}")

        plain = {"step_losses": None, "learned_inner_lr": False}
        if self.explicit:
            only("algo=contrastive is the explicit loss of algo.adapted=head", adapted="head", head="learned", **plain)
            only("the explicit loss is that of cross entropy", loss="cross_entropy")
        if self.explicit and not self.first_order:
            only("the explicit loss of several inner steps is known in first order alone", inner_steps=1)
        if self.distance:
            why = "algo=protonet has prototypes for a head and adapts nothing"
            only(why, head="prototypes", adapted="all", **plain)
        else:
            only("only algo=protonet has one", temperature=None)
        if self.adapted == "encoder":
            only("with algo.adapted=encoder the head stays zero and nothing is learned from it", zeroing=False)
        if self.makes_head:
            only(f"with algo.head={self.head} no head is learned that could be zeroed", zeroing=False)
        own_head = self.overrides("initial_head") if type(self) is not InnerLoop else self.head == "own"
        if (self.head == "own") != own_head or (own_head and self.target is None):
            raise UserError(
                f"algo.head={self.head} algo._target_={shown(self.target)}: a head rule of your own needs both, "
                "algo.head=own and as algo._target_ the class that has its initial_head"
            )
        for name, value in self.needs.items():
            only(f"{type(self).__name__} works with no other value", **{name: value})
        if self.overrides("update", "outer_gradient"):
            only(f"{self.target} has an inner loop of its own", distance=None, noise=None, learned_inner_lr=False)
        if self.overrides("outer_gradient"):
            only(f"{self.target} has an outer gradient of its own", step_losses=None)

    # What an algorithm of one's own may override. `theta` has one task's parameters, or those of B with a leading B.

    def start(self, theta: Tensors, encode: Callable[..., Any], support: Any, labels: Any) -> Tensors:
        """What a task begins with in place of parameters of theta, by name; encode: images to their features."""
        return {}

    def initial_head(self, features: Any, labels: Any, ways: int) -> Tensors:
        """The head of a task at first, of features (..., S, d), labels (..., S): weight (..., K, d), bias (..., K)."""
        raise NotImplementedError

    def update(self, theta: Tensors, gradients: Tensors, state: Any) -> tuple[Tensors, Any]:
        """What an inner step adds to theta_n, and the state for the next step; the first step gets None."""
        return {name: -self.inner_lr * g for name, g in gradients.items()}, state

    def outer_gradient(self, theta: Tensors, theta_N: Tensors, support_loss: Loss, query_loss: Loss) -> Any:
        """The outer gradient of an algorithm that does not differentiate its inner loop; and what `measures` names."""
        raise NotImplementedError

    def overrides(self, *methods: str) -> bool:
        return any(getattr(type(self), method) is not getattr(InnerLoop, method) for method in methods)

    @property
    def explicit(self) -> bool:
        """Whether the explicit contrastive loss takes the place of differentiating through the inner loop."""
        return self.noise is not None

    @property
    def makes_head(self) -> bool:
        """Whether the head of each task is made from its support set, so that none is learned."""
        return self.head in ("prototypes", "own")

    @property
    def beyond_theory(self) -> str:
        """The first knob that the closed forms do not cover, "" if there is none; they cover THEORY."""
        beyond = {
            f"algo.head={self.head}": self.makes_head,
            f"algo.adapted={self.adapted}": self.adapted == "encoder",
            "algo.learned_inner_lr=true": self.learned_inner_lr,
            f"loss={self.loss}": self.loss != "cross_entropy",
            f"algo._target_={self.target}": self.overrides("start", "update"),
        }
        return next((knob for knob, holds in beyond.items() if holds), "")

    def ways(self, rows: int) -> str:
        """In words, how many classes a model adapts to; rows: those of its head."""
        if self.learned_inner_lr:
            return f"{rows} classes"
        if self.zeroing or self.head != "learned":
            return "any number of classes"
        more = ", to more with `test_zeroing=true`" if self.adapted != "encoder" else ""
        return f"2 to {rows} classes{more}"

    @property
    def name(self) -> str:
        """E.g. "SOMAML", "ANIL (first order) + zeroing"."""
        return self.named() + " + zeroing" * self.zeroing + f", loss={self.loss}" * (self.loss != LOSSES[0])

    def named(self, maml: str = "", order: bool = True) -> str:
        """The algorithm by the papers' names where it has one, without its zeroing.

        Args:
            maml: what MAML itself is called; empty: FOMAML or SOMAML.
            order: whether the other algorithms say their order.
        """
        changes, details = self.changes, [ORDERS[self.first_order]] if order else []
        if self.explicit:
            left_out = " or ".join(term for term in ("noise", "interference") if getattr(self, term) is False)
            name = "explicit contrastive loss" + f" without {left_out}" * bool(left_out)
        elif len(changes) == 1:
            ((name, words),) = changes.items()
            details = {"MSL": [f"{self.step_losses} updates"], "ProtoNet": [words]}.get(name, []) + details
        else:
            return ", ".join([maml or ("FOMAML" if self.first_order else "SOMAML"), *changes.values()])
        return name + (f" ({', '.join(details)})" if details else "")

    @property
    def changes(self) -> dict[str, str]:
        """What differs from MAML, as {the algorithm's name if it is the only change: the words if there are others}."""
        own = (self.target or "").rsplit(".", 1)[-1]
        scale = f", temperature {self.temperature:g}" if self.temperature else ""
        changes = {
            "ANIL": ("head only", self.adapted == "head"),
            "BOIL": ("encoder only", self.adapted == "encoder"),
            "UnicornMAML": ("one head vector", self.head == "shared"),
            "ProtoMAML": ("head from prototypes", self.head == "prototypes" and not self.distance),
            "ProtoNet": (DISTANCES.get(self.distance or "", "") + scale, self.distance is not None),
            own: (own, self.target is not None),
            "MSL": (f"step losses for {self.step_losses}", self.step_losses is not None),
            "Meta-SGD": ("learned inner_lr", self.learned_inner_lr),
        }
        return {name: words for name, (words, holds) in changes.items() if holds}

    @property
    def is_maml(self) -> bool:
        """FOMAML or SOMAML, with or without zeroing."""
        return not self.explicit and not self.changes
