"""The pydantic base of everything a recipe holds: frozen, strict, and helpful about unknown keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, LiteralString, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _read_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]i?B|B|)\s*", value, re.IGNORECASE)
    try:
        assert match
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (AssertionError, ValueError):
        raise PydanticCustomError("bytes", "should be a size such as 8GiB or 500MB") from None


_BYTES_SCHEMA = {
    "anyOf": [
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9.]+\s*([KMGkmg]?[Ii]?[Bb])?\s*$"},
    ]
}
Bytes = Annotated[int, BeforeValidator(_read_bytes), Field(gt=0), WithJsonSchema(_BYTES_SCHEMA)]
"""A number of bytes, written as one or as `8GiB`."""


BESIDE = "beside the recipe"
InputFile = Annotated[str, BESIDE]
"""A file to read. A relative path in a recipe counts from the recipe's own folder, if there is such a file."""


class Options(BaseModel):
    """A piece of a recipe: frozen once read, types are not converted, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler) -> Any:
        if data is None:
            data = {}  # `obs_diff:` with nothing behind it
        try:
            return handler(data)
        except ValidationError as error:
            raise rebuild(error, cls.__name__, lambda e: _explain_unknown(e, list(cls.model_fields))) from None

    def move_files(self, beside: Callable[[str], str]) -> Self:
        """The same with every `InputFile`, also in options within these, changed by a function."""
        changes: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if BESIDE in field.metadata and value is not None:
                changes[name] = beside(value)
            elif isinstance(value, Options):
                changes[name] = value.move_files(beside)
        changed = {name for name, value in changes.items() if value != getattr(self, name)}
        return self.model_copy(update={name: changes[name] for name in changed}) if changed else self

    @classmethod
    def required_options(cls) -> tuple[str, ...]:
        """The options that have no default."""
        return tuple(name for name, option in cls.model_fields.items() if option.is_required())


def suggest(name: str, known: Sequence[str]) -> str:
    """A clause `; did you mean 'x'?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def rebuild(
    error: ValidationError,
    title: str,
    change: Callable[[ErrorDetails], str | None] = lambda e: None,
    prefix: tuple[str | int, ...] = (),
) -> ValidationError:
    """The same errors with other words or another place.

    Args:
        error: what pydantic found.
        title: name of the model the new error speaks of.
        change: gives new words for an error, or None to keep its own.
        prefix: put in front of every location.
    """
    details: list[InitErrorDetails] = []
    for e in error.errors(include_url=False):
        words = change(e)
        kind = e["type"] if words is None else "unknown_key"
        custom = PydanticCustomError(
            cast(LiteralString, kind), "{message}", {"message": e["msg"] if words is None else words}
        )
        details.append(InitErrorDetails(type=custom, loc=(*prefix, *e["loc"]), input=e["input"]))
    return ValidationError.from_exception_data(title, details)


def _explain_unknown(e: ErrorDetails, known: list[str]) -> str | None:
    if e["type"] != "extra_forbidden" or len(e["loc"]) != 1:
        return None
    clause = suggest(str(e["loc"][0]), known)
    return f"unknown key{clause or '; known: ' + (', '.join(known) or 'none')}"
