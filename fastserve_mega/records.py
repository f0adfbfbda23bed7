"""Records that enter or leave a process: configurations, messages, logs and other files.

msgspec checks what comes in, the bounds in the types included. A record made in Python is checked
by its `__post_init__` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]

_LONGEST_VALUE = 60
"""Characters of a wrong value that a sentence shows."""
_AT = re.compile(r"(.*) - at `(key` in `)?\$([^`]*)`", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_OUT_OF_RANGE = re.compile(r"Expected `(?:int|float)` ([<>]=?) (\S+)")
_BOUNDS = {
    ">": ("gt", "above"),
    ">=": ("ge", "at least"),
    "<": ("lt", "below"),
    "<=": ("le", "at most"),
}
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An immutable record; decoding refuses fields that it does not have."""


class OpenRecord(msgspec.Struct, frozen=True):
    """A record for readers that may be older than the writer: they skip what they do not know."""


def convert(plain: object, target: type[T]) -> T:
    """Make a record of plain data, such as nested dicts and lists; nothing is coerced.

    Raises:
        ValueError: the data is not such a record; the message is that of `explain`.
    """
    try:
        return msgspec.convert(plain, target)
    except msgspec.ValidationError as error:
        raise ValueError(explain(error, plain, target)) from None


def explain(error: msgspec.ValidationError, plain: object, target: object) -> str:
    """What is wrong with the data, as one sentence with the field, the value and the limit.

    Args:
        error: raised by a decoder.
        plain: the same data, decoded without a type.
        target: the type it should have had: a record, or a union of some.
    """
    found = _AT.fullmatch(str(error))
    problem, key, path = found.groups() if found else (str(error), None, "")
    where = path.removeprefix(".")
    value = _value_at(plain, path)
    types = _types_at(target, plain, path)
    if where and problem.startswith(f"{where}."):  # a record that names its field itself
        return problem
    records = _records_among(types, value)
    if (name := _stray_field(problem, value if key and records else None)) is not None:
        name = f"{where}.{name}" if where else name
        fields = dict.fromkeys(f for record in records for f in record.__struct_encode_fields__)
        return f"unknown field {name!r}; known fields are {', '.join(fields) or 'none'}"
    if must := _must(problem, types):
        return f"{where or 'the value'} must {must}, got {_shortened(value)}"
    if problem.startswith("Expected") and ", got" not in problem:
        problem += f", got {_shortened(value)}"
    elif problem.startswith("Invalid value") and path.endswith(".type"):
        among = _records_in(_types_at(target, plain, path.removesuffix(".type")))
        tags = ", ".join(str(record.__struct_config__.tag) for record in among)
        problem = f"{_shortened(value)} is not one of {tags}"
    return f"{problem} - at `{where}`" if where else problem


def _stray_field(problem: str, keys: Any) -> str | None:
    """The name of a field that a record does not have; None when that is not the problem.

    Args:
        problem: what msgspec says.
        keys: of the data for the record, when one of them is no string, as YAML allows.
    """
    if unknown := _UNKNOWN_FIELD.fullmatch(problem):
        return unknown[1]
    return next((str(key) for key in keys or () if not isinstance(key, str)), None)


def _must(problem: str, types: list[Any]) -> str | None:
    """What a value out of bounds, or that is none of some, must be; None: another problem."""
    choices = [value for each in types if get_origin(each) is Literal for value in get_args(each)]
    if choices and problem.startswith(("Invalid enum value", "Expected `str")):
        return f"be one of {', '.join(map(str, choices))}"
    if problem == "Expected `str` of length >= 1":
        return "not be empty"
    if not (found := _OUT_OF_RANGE.fullmatch(problem)):
        return None
    metas = [each for each in types if isinstance(each, Meta)]
    if len(metas) != 1:
        return f"be {_BOUNDS[found[1]][1]} {found[2]}"
    limits = [(word, getattr(metas[0], name)) for name, word in _BOUNDS.values()]
    bounds = " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)
    return f"be {bounds} ({metas[0].description})" if metas[0].description else f"be {bounds}"


def _shortened(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _steps(path: str) -> Iterator[str | int]:
    """Names and indices of a path like `.prompt[3]`."""
    for name, index in _STEP.findall(path):
        yield name or int(index)


def _value_at(plain: Any, path: str) -> object:
    for step in _steps(path):
        try:
            plain = plain[step]
        except (LookupError, TypeError):
            return None
    return plain


def _types_at(target: object, plain: Any, path: str) -> list[Any]:
    """All that the type at a path mentions, the fields of records with another tag left out."""
    types = list(_mentioned(target))
    for step in _steps(path):
        if isinstance(step, str):
            records = _records_among(types, plain)
            fields = [field for record in records for field in msgspec.structs.fields(record)]
            types = [t for f in fields if f.encode_name == step for t in _mentioned(f.type)]
        plain = _value_at(plain, f"[{step}]" if isinstance(step, int) else f".{step}")
    return types


def _mentioned(target: object) -> Iterator[Any]:
    """A type and all in it, for example in `tuple[Record, ...] | None`; bounds as well."""
    yield target
    for argument in get_args(target):
        yield from _mentioned(argument)


def _records_among(types: list[Any], plain: object) -> list[type[msgspec.Struct]]:
    """The records, those with another tag than the data left out."""
    tag = plain.get("type") if isinstance(plain, dict) else None
    return [each for each in _records_in(types) if each.__struct_config__.tag in (tag, None)]


def _records_in(types: list[Any]) -> list[type[msgspec.Struct]]:
    return [each for each in types if isinstance(each, type) and issubclass(each, msgspec.Struct)]
