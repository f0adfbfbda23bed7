"""Records that leave a process: on the wire, in logs and files. msgspec checks what comes in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]

_LONGEST_VALUE = 60
"""Characters of a wrong value that a sentence shows."""
_AT = re.compile(r"(.*) - at `(?:key` in `)?\$([^`]*)`", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An immutable record; decoding refuses fields that it does not have."""


class OpenRecord(msgspec.Struct, frozen=True):
    """A record for readers that may be older than the writer: they skip what they do not know."""


def explain(error: msgspec.ValidationError, plain: object, target: object) -> str:
    """What is wrong with the data, as one sentence with the field, the value and the limit.

    Args:
        error: raised by a decoder.
        plain: the same data, decoded without a type.
        target: the type it should have had: a record, or a union of some.
    """
    found = _AT.fullmatch(str(error))
    problem, path = found.groups() if found else (str(error), "")
    where = path.removeprefix(".")
    if unknown := _UNKNOWN_FIELD.fullmatch(problem):
        name = f"{where}.{unknown[1]}" if where else unknown[1]
        records = _records_at(target, plain, path)
        fields = dict.fromkeys(f for record in records for f in record.__struct_encode_fields__)
        return f"unknown field {name!r}; known fields are {', '.join(fields) or 'none'}"
    if problem.startswith("Expected") and ", got" not in problem:
        problem += f", got {_shortened(_value_at(plain, path))}"
    elif problem.startswith("Invalid value") and path.endswith(".type"):
        tags = ", ".join(_tags_at(target, plain, path.removesuffix(".type")))
        problem = f"{_shortened(_value_at(plain, path))} is not one of {tags}"
    return f"{problem} - at `{where}`" if where else problem


def _shortened(value: object) -> str:
    text = repr(value)
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


def _records_at(target: object, plain: object, path: str) -> list[type[msgspec.Struct]]:
    """The records that may stand at a path, those with another tag left out."""
    records = list(_records_in(target))
    for step in _steps(path):
        records = _with_tag_of(records, plain)
        plain = _value_at(plain, f"[{step}]" if isinstance(step, int) else f".{step}")
        if isinstance(step, str):
            fields = [f for record in records for f in msgspec.structs.fields(record)]
            records = [r for f in fields if f.encode_name == step for r in _records_in(f.type)]
    return _with_tag_of(records, plain)


def _with_tag_of(records: list[type[msgspec.Struct]], plain: object) -> list[type[msgspec.Struct]]:
    tag = plain.get("type") if isinstance(plain, dict) else None
    return [record for record in records if record.__struct_config__.tag in (tag, None)]


def _records_in(target: object) -> Iterator[type[msgspec.Struct]]:
    """The records that a type mentions, for example in `tuple[Record, ...] | None`."""
    if isinstance(target, type) and issubclass(target, msgspec.Struct):
        yield target
    for argument in get_args(target):
        yield from _records_in(argument)


def _tags_at(target: object, plain: object, path: str) -> list[str]:
    parent, _, last = path.rpartition(".")
    if not last:
        return [str(record.__struct_config__.tag) for record in _records_in(target)]
    name = last.partition("[")[0]
    return [
        str(inner.__struct_config__.tag)
        for record in _records_at(target, plain, parent)
        for field in msgspec.structs.fields(record)
        if field.encode_name == name
        for inner in _records_in(field.type)
    ]
