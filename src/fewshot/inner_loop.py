"""The algorithm as a value: how one task turns theta into theta_n.

Imports no torch, because checks, sweeps and model cards ask it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from fewshot.errors import UserError, shown

Adapted = Literal["all", "head", "encoder"]
Head = Literal["learned", "shared", "prototypes", "own"]
ORDERS = {True: "first order", False: "second order"}


@dataclass(frozen=True)
class InnerLoop:
    """How one task turns theta into theta_n. Each algorithm of the family is one setting of these fields:

    MAML    first_order=False   ANIL  adapted="head"     ProtoMAML    head="prototypes"  MAML++ (MSL)  step_losses=60
    FOMAML  first_order=True    BOIL  adapted="encoder"  UnicornMAML  head="shared"      Meta-SGD      learned_inner_lr

    A head rule of one's own is a class that derives from this one and has an `initial_head`; algo.head=own says so, and
    algo._target_ names the class. It may have more fields, which are knobs of algo.
    """

    inner_steps: int  # N
    inner_lr: float  # eta; if eta is learned, the value that it starts from
    first_order: bool  # True: d theta_n / d theta is taken to be 1
    zeroing: bool = False  # w <- 0 whenever the loop begins
    adapted: Adapted = "all"
    head: Head = "learned"  # where the head of each task starts; shared: one learned row for all classes
    step_losses: int | None = None  # outer updates until only the last step's query loss counts; None: from the start
    learned_inner_lr: bool = False  # one eta for every number that adapts
    noise: bool | None = None  # a term of the explicit loss, which takes MAML's place; None: MAML
    interference: bool | None = None  # likewise
    recompute_steps: bool = False  # second order in the memory of one inner step; the same numbers
    target: str | None = None  # where a class of one's own lies; None: it is this one

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "InnerLoop":
        """The inner loop of a composed configuration, or of a stored one, which may lack the newer fields.

        Nothing that the configuration names is called: to train, call this of the class that algo._target_ names.

        Raises:
            UserError: a combination of fields with which nothing can be trained.
        """
        algo = config["algo"]
        stored = {name: algo[name] for field in fields(cls) if (name := field.name) in algo}
        stored |= {name: config[name] for name in ("inner_steps", "inner_lr", "recompute_steps") if name in config}
        zeroing = config.get("zeroing", algo["zeroing"])  # +zeroing=true|false overrides the algorithm's
        loop = cls(**stored | {"zeroing": zeroing, "target": algo.get("_target_")})
        loop._check()
        return loop

    def evaluation(self, steps: int, zeroing: bool) -> "InnerLoop":
        """The same adaptation to be evaluated; in first order, since the adapted parameters are the same."""
        return replace(self, inner_steps=steps, first_order=True, zeroing=zeroing)

    def _check(self) -> None:
        if self.explicit and (self.inner_steps != 1 or self.adapted != "head"):
            raise UserError(
                f"inner_steps={self.inner_steps} algo.adapted={self.adapted}: the explicit loss of algo=contrastive is "
                "that of one inner step of the head; use inner_steps=1 algo.adapted=head"
            )
        usual = {"head": "learned", "step_losses": None, "learned_inner_lr": False}
        for name, value in usual.items() if self.explicit else ():
            if getattr(self, name) != value:
                unlike = shown(getattr(self, name))
                raise UserError(f"algo.{name}={unlike}: algo=contrastive has an explicit loss without it")
        if self.zeroing and self.adapted == "encoder":
            raise UserError(
                "+zeroing=true: with algo.adapted=encoder the head stays zero and nothing is learned from it"
            )
        if self.zeroing and self.makes_head:
            raise UserError(f"+zeroing=true: with algo.head={self.head} no head is learned that could be zeroed")
        if (self.head == "own") != (self.target is not None):
            raise UserError(
                f"algo.head={self.head} algo._target_={shown(self.target)}: a head rule of your own needs both, "
                "algo.head=own and as algo._target_ the class that has its initial_head"
            )

    def initial_head(self, features: Any, labels: Any, ways: int) -> dict[str, Any]:
        """For one's own algorithm with head="own": where the head of each task starts, made from its support set.

        Args:
            features: (..., S, d), phi(s) at theta.
            labels: (..., S).
            ways: K.

        Returns weight (..., K, d) and, if the head has one, bias (..., K).
        """
        raise NotImplementedError(f"{type(self).__name__}: has algo.head=own, so it must define initial_head")

    @property
    def explicit(self) -> bool:
        """Whether the explicit contrastive loss takes the place of differentiating through the inner loop."""
        return self.noise is not None

    @property
    def makes_head(self) -> bool:
        """Whether the head of each task is made from its support set, so that none is learned."""
        return self.head in ("prototypes", "own")

    @property
    def theory_applies(self) -> bool:
        """Whether the closed forms speak of it: a learned head that adapts with a single inner_lr."""
        return self.head in ("learned", "shared") and self.adapted != "encoder" and not self.learned_inner_lr

    def ways(self, rows: int) -> str:
        """How many classes a model adapts to whose head has so many rows, in words."""
        if self.learned_inner_lr:
            return f"{rows} classes"
        if self.zeroing or self.head != "learned":
            return "any number of classes"
        more = ", to more with `test_zeroing=true`" if self.adapted != "encoder" else ""
        return f"2 to {rows} classes{more}"

    @property
    def name(self) -> str:
        """E.g. "SOMAML", "ANIL (first order) + zeroing"."""
        return self.named() + " + zeroing" * self.zeroing

    def named(self, maml: str = "", order: bool = True) -> str:
        """The algorithm by the papers' names where it has one, without its zeroing.

        Args:
            maml: what MAML itself is called; empty: FOMAML or SOMAML.
            order: whether the other algorithms say their order.
        """
        maml = maml or ("FOMAML" if self.first_order else "SOMAML")
        details = [ORDERS[self.first_order]] if order else []
        if self.explicit:
            left_out = " or ".join(term for term in ("noise", "interference") if getattr(self, term) is False)
            name = "explicit contrastive loss" + f" without {left_out}" * bool(left_out)
        elif len(self.changes) == 1:
            name = next(iter(self.changes))
            details = [f"{self.step_losses} updates"] * (name == "MSL") + details
        else:
            return ", ".join([maml, *self.changes.values()])
        return name + (f" ({', '.join(details)})" if details else "")

    @property
    def changes(self) -> dict[str, str]:
        """What differs from MAML: the algorithm's name, if it is the only change, and words for it beside others."""
        own = (self.target or "").rsplit(".", 1)[-1]
        changes = {
            "ANIL": ("head only", self.adapted == "head"),
            "BOIL": ("encoder only", self.adapted == "encoder"),
            "UnicornMAML": ("one head vector", self.head == "shared"),
            "ProtoMAML": ("head from prototypes", self.head == "prototypes"),
            own: (own, self.target is not None),
            "MSL": (f"step losses for {self.step_losses}", self.step_losses is not None),
            "Meta-SGD": ("learned inner_lr", self.learned_inner_lr),
        }
        return {name: words for name, (words, holds) in changes.items() if holds}

    @property
    def is_maml(self) -> bool:
        """FOMAML or SOMAML, with or without zeroing."""
        return not self.explicit and not self.changes


ADAPTED, HEADS = get_args(Adapted), get_args(Head)
