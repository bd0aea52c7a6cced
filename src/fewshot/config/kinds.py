"""What the value of a knob may be, as types: the words of each are what a refusal says of another value."""

# pyright: reportArgumentType=false, reportInvalidTypeForm=false, reportOptionalSubscript=false
# Types and messages are made at run time, as pydantic allows and its annotations do not.

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from fewshot.errors import nearest, shown

# Said of a text that would be valid without its quotes: a number, true or a list.
IS_TEXT = "is a text; leave the quotes out, or write ${oc.decode:${oc.env:NAME}} for a variable of the environment"
LARGEST = 3.4e38  # of 32-bit floating-point numbers


def must_be(
    words: str, kind: Any, limit: tuple[float, str] | None = None, refused: Callable[[Any], bool] = lambda value: False
) -> Any:
    """The type `kind` without the values that are `refused`; the words say what a value must be.

    limit: (a number, the words for a value that is as large or larger).
    """

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        with suppress(ValidationError):
            if not refused(valid := validate(value)):
                return valid
        large = limit is not None and type(value) in (int, float) and limit[0] <= value < float("inf")
        if isinstance(value, str):
            with suppress(ValidationError):
                if not refused(validate(_without_quotes(value))):
                    raise PydanticCustomError("knob", IS_TEXT)
        raise PydanticCustomError("knob", f"must be {limit[1] if large else words}")

    most = f", {limit[1]}" if limit and limit[0] < 10**9 else ""
    return Annotated[kind, WrapValidator(check), Field(description=words + most)]


def _without_quotes(text: str) -> Any:
    """What Hydra would read in a call."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # takes its time to import

    with suppress(Exception):  # of Hydra's grammar
        if len(text) < 100:
            return OverridesParser.create().parse_override(f"key={text}").value()
    return text


def optional(kind: Any) -> Any:
    """`kind` or null; the words add "or null"."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return None if value is None else validate(value)
        except ValidationError as error:
            if any(mistake["loc"] for mistake in error.errors()):
                raise
            words = error.errors()[0]["msg"]
            raise PydanticCustomError("knob", words if words == IS_TEXT else f"{words}, or null") from None

    words = [f"{note.description}, or null" for note in get_args(kind) if getattr(note, "description", None)]
    return Annotated[kind, WrapValidator(check), Field(description="".join(words) or None)]


def integer(least: int, most: int = 10**9) -> Any:
    kind = Annotated[int, Field(ge=least, le=most)]
    return must_be(f"an integer of at least {least}", kind, (most, f"at most {most}"))


def above_zero(most: float = LARGEST) -> Any:
    words = "a fraction, at most 1" if most == 1 else f"at most {most:g}"
    return must_be("a number above 0", Annotated[float, Field(gt=0, le=most, allow_inf_nan=False)], (most, words))


def from_zero(below: float = LARGEST) -> Any:
    words = "a fraction, below 1" if below == 1 else f"below {below:g}"
    kind = Annotated[float, Field(ge=0, lt=below, allow_inf_nan=False)]
    return must_be("a number of at least 0", kind, (below, words))


def numbers(words: str, **limits: Any) -> Any:
    return must_be(f"a list of {words}", list[Annotated[float, Field(**limits, allow_inf_nan=False)]])


def one_of(*names: str) -> Any:
    return must_be(f"one of {', '.join(names)}", Literal[names])


def only(value: Any, why: str) -> Any:
    return Annotated[must_be(f"{shown(value)}; {why}", Literal[value]), Field(description=f"only {shown(value)}")]


def text(words: str, pattern: str = r".+") -> Any:
    return must_be(words, Annotated[str, Field(pattern=rf"(?s)^(?:{pattern})$")])


Flag = must_be("true or false", bool)
Name = text("a name of letters, digits and ._-", r"[\w.-]+")
Path = text("a path, with ./ before a number")
Target = text("the dotted name of a class or function", r"\w+(\.\w+)+")
Channels = must_be("1 (grey) or 3 (colour)", Annotated[int, Field(ge=1, le=3)], refused=lambda value: value == 2)
Project = text(r"a name of at most 128 characters, none of them / \ # ? % :", r"[^/\\#?%:]{1,128}")
WandbName = text("a text of at most 128 characters, in quotes if it is a number", r".{1,128}")


class Part(BaseModel):
    """Some knobs, and no others. instead: {a knob of Lightning's: ours that does what it would do}."""

    model_config = ConfigDict(strict=True, extra="forbid")
    instead: ClassVar[dict[str, str]] = {}

    @classmethod
    def knobs(cls) -> list[str]:
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            wanted = [f"{key}: ..." for key in cls.knobs()[:3]] + ["..."] * (len(cls.knobs()) > 3)
            raise PydanticCustomError("knob", f"must be {{{', '.join(wanted)}}}")
        if cls.model_config.get("extra") == "forbid" and (unknown := [key for key in values if key not in cls.knobs()]):
            words = f"no such knob; {nearest(str(unknown[0]), {*cls.knobs()} - {'_target_'})}"
            if unknown[0] in cls.instead:
                words = f"does not do here what Lightning says; use {cls.instead[unknown[0]]}"
            complaint = PydanticCustomError("knob", words)
            details = InitErrorDetails(type=complaint, loc=(unknown[0],), input=values[unknown[0]])
            raise ValidationError.from_exception_data(cls.__name__, [details])
        return values


class Made(Part, extra="allow"):
    """What Hydra makes by calling `_target_` with the other knobs."""

    target: Target = Field(alias="_target_")


def part(ours: type[Part], own: type[Part] = Made, maker: str | None = None) -> Any:
    """The type `ours`; or `own` if `_target_`, of the knob `maker` where one is named, is not this program's."""

    def check(values: Any, validate: Callable[[Any], Any]) -> Part:
        made = values.get(maker) if maker and isinstance(values, dict) else values
        target = made.get("_target_") if isinstance(made, dict) else None
        return (own if isinstance(target, str) and not target.startswith("fewshot.") else ours).model_validate(values)

    return Annotated[Any, WrapValidator(check), (ours,)]  # in a tuple, which pydantic takes for a note
