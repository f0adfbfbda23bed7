"""Plain data (from YAML or msgpack) to dataclasses, with nothing ignored and nothing coerced."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

import msgspec

T = TypeVar("T")
_PLACE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


def from_plain(raw: object, target: type[T]) -> T:
    """Convert nested dicts and lists to `target`, a dataclass type.

    Raises:
        ValueError: unknown or missing field, wrong type, or a value its dataclass refuses; the
            message names the field by its path, for example `scheduler.max_batch_size`.
    """
    _refuse_unknown_fields(raw, target, path="")
    try:
        return msgspec.convert(raw, target, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(_sentence(str(error), target)) from None


def _sentence(said: str, target: Any) -> str:
    """What msgspec said, with the path of the field once and the values it may have."""
    place = _PLACE.search(said)
    if place is None:
        return said
    path, reason = place["path"], said[: place.start()]
    if path and reason.startswith(f"{path}."):  # a dataclass that names its field itself
        return reason
    if reason.startswith("Invalid enum value") and (known := _known_values(target, path)):
        reason += f"; known values are {', '.join(map(str, known))}"
    return f"{reason} - at `{path}`" if path else reason


def _known_values(target: Any, path: str) -> tuple[object, ...]:
    """Values of the `Literal` at a path; empty when there is none to be found."""
    for name in path.split("."):
        target = (_field_types(target) or {}).get(name)
    arms = (target, *typing.get_args(target))
    return next((typing.get_args(arm) for arm in arms if typing.get_origin(arm) is Literal), ())


def _refuse_unknown_fields(raw: object, target: Any, path: str) -> None:
    """Refuse here, since msgspec forbids unknown fields for its own structs only."""
    if not isinstance(raw, Mapping) or (fields := _field_types(target)) is None:
        return
    for name, value in raw.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in fields:
            raise ValueError(f"unknown field {where!r}; known fields are {', '.join(fields)}")
        _refuse_unknown_fields(value, fields[name], where)


@cache
def _field_types(target: Any) -> dict[str, Any] | None:
    """Field name to type of a dataclass (also inside `X | None`); None for any other type."""
    if isinstance(target, types.UnionType) or typing.get_origin(target) is typing.Union:
        members = [arm for arm in typing.get_args(target) if dataclasses.is_dataclass(arm)]
        target = members[0] if members else None
    if not dataclasses.is_dataclass(target):
        return None
    hints = typing.get_type_hints(target)
    return {field.name: hints[field.name] for field in dataclasses.fields(target)}
