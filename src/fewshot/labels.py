"""What algorithms and settings are called: by the papers' names where they have one, else by their knobs."""

from collections.abc import Iterable
from typing import Any

from fewshot.errors import printable, shown

HEADS = {  # the poster's three: (zeroing, init_scale)
    (False, 1): "random head",
    (False, 0): "zero at the start",
    (True, 1): "zeroed every update",
}
ORDERS = {True: "first order", False: "second order"}


def title(config: dict[str, Any], algorithm: bool = True) -> str:
    """E.g. "FOMAML + zeroing, glyphs 5-way 1-shot"."""
    task = f"{config['dataset']['name']} {config['ways']}-way {config['shots']}-shot"
    return printable(f"{algorithm_name(config['algo'])}, {task}" if algorithm else task)


def algorithm_name(algo: dict[str, Any]) -> str:
    """E.g. "SOMAML", "ANIL (first order) + zeroing"."""
    return _name(algo, "SOMAML" if not algo["first_order"] else "FOMAML", order=True) + " + zeroing" * algo["zeroing"]


def setting_label(knobs: dict[str, Any], algo: dict[str, Any], without: Iterable[str] = ()) -> str:
    """E.g. "SOMAML, zeroing, inner_steps=3": the algorithm by its name, other knobs as they are given.

    Args:
        knobs: those in which settings differ, and their values in this one.
        algo: all of the setting's algorithm.
        without: knobs that are said elsewhere.
    """
    kept, parts = {key: value for key, value in knobs.items() if key not in without}, []
    if any(key.startswith("algo.") and key != "algo.zeroing" for key in kept):
        maml = "MAML" if "algo.first_order" in without else "FOMAML" if algo["first_order"] else "SOMAML"
        parts.append(_name(algo, maml, order="algo.first_order" in kept))
    elsewhere = algo.get("head", "learned") != "learned"  # the head begins elsewhere, as its name says
    return printable(", ".join([*parts, *_others(kept, without=("random head",) if elsewhere else ())]))


def panel_title(knobs: dict[str, Any], maml: bool) -> str:
    """Of what all settings in a panel share; maml: they are FOMAML or SOMAML, with or without zeroing."""
    first = knobs.get("algo.first_order")
    order = [] if first is None else ["FOMAML" if first else "SOMAML"] if maml else [ORDERS[first]]
    named = ("algo.first_order", "algo.zeroing")
    algo = [f"{key}={shown(value)}" for key, value in knobs.items() if key.startswith("algo.") and key not in named]
    return printable(", ".join([*order, *algo, *_others(knobs)]))


def is_maml(algo: dict[str, Any]) -> bool:
    """FOMAML or SOMAML, with or without zeroing."""
    return "noise" not in algo and not _changes(algo)


def _name(algo: dict[str, Any], maml: str, order: bool) -> str:
    """maml: what MAML itself is called; order: whether others say theirs."""
    changes, details = _changes(algo), [ORDERS[algo["first_order"]]] if order else []
    if "noise" in algo:
        left_out = " or ".join(term for term in ("noise", "interference") if algo.get(term) is False)
        name = "explicit contrastive loss" + f" without {left_out}" * bool(left_out)
    elif len(changes) == 1:
        name, _ = changes[0]
        details = [f"{algo['step_losses']} updates"] * (name == "MSL") + details
    else:
        return ", ".join([maml, *(words for _, words in changes)])
    return name + (f" ({', '.join(details)})" if details else "")


def _changes(algo: dict[str, Any]) -> list[tuple[str, str]]:
    """What is not as in MAML itself: its name if it is the only change, and words. An old results.json has none."""
    adapted, head = algo.get("adapted", "all"), algo.get("head", "learned")
    return [
        *([("ANIL", "head only")] if adapted == "head" else []),
        *([("BOIL", "encoder only")] if adapted == "encoder" else []),
        *([("UnicornMAML", "one head vector")] if head == "shared" else []),
        *([("ProtoMAML", "head from prototypes")] if head == "prototypes" else []),
        *([("MSL", f"step losses for {algo['step_losses']}")] if algo.get("step_losses") else []),
        *([("Meta-SGD", "learned inner_lr")] if algo.get("learned_inner_lr") else []),
    ]


def _others(knobs: dict[str, Any], without: Iterable[str] = ()) -> list[str]:
    """All but the algorithm: what becomes of the head, and knobs as they are given."""
    parts, others = [], {key: value for key, value in knobs.items() if not key.startswith("algo.")}
    zeroing = knobs.get("algo.zeroing")
    if head := HEADS.get((zeroing, knobs.get("init_scale"))):
        parts, _ = [head], others.pop("init_scale")
    elif zeroing is not None:
        parts = ["zeroing" if zeroing else "no zeroing"]
    return [
        *(part for part in parts if part not in without),
        *(f"{key}={shown(value)}" for key, value in others.items()),
    ]
