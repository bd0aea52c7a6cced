"""Whether what an algorithm makes has the names and the shapes of the parameters that it is for."""

from collections.abc import Mapping
from typing import Any

from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop, Tensors


def fitting(loop: InnerLoop, name: str, made: Any, parameters: Tensors, *, all_of_them: bool = True) -> Tensors:
    """What the method of this name has made, as far as it is for these parameters.

    all_of_them: whether it must have all of the parameters; else it may have some of them, and nothing else.

    Raises:
        UserError: it is not a dictionary of tensors with the parameters' names and shapes.
    """
    by = method(loop, name)
    if not isinstance(made, Mapping):
        raise UserError(f"{by}: gives a {type(made).__name__}; it must be a dict of tensors by the parameters' names")
    if unknown := [] if all_of_them else [key for key in made if key not in parameters]:
        raise UserError(f"{by}: its {unknown[0]} is no parameter; they are {', '.join(parameters)}")
    for key, parameter in parameters.items() if all_of_them else ((key, parameters[key]) for key in made):
        shape = tuple(getattr(made[key], "shape", ())) if key in made else "missing"
        if shape != tuple(parameter.shape):
            raise UserError(f"{by}: its {key} is {shape}; it must be {tuple(parameter.shape)}, as the network's own")
    return {key: made[key] for key in parameters if key in made}


def two(loop: InnerLoop, name: str, made: Any) -> tuple[Any, Any]:
    """Both things that the method of this name has made."""
    if not (isinstance(made, tuple) and len(made) == 2):
        by, kind = method(loop, name), type(made).__name__
        raise UserError(f"{by}: gives a {kind}; it must be two things, the second a state or what it measures")
    return made


def method(loop: InnerLoop, name: str) -> str:
    """E.g. "algo.head=own: MedianHead.initial_head"."""
    knob = f"algo.head={loop.head}" if name == "initial_head" else f"algo._target_={loop.target}"
    return f"{knob}: {type(loop).__name__}.{name}"
