"""Reads configurations from YAML, with strict validation and one sentence for what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastserve_mega.records import convert
from fastserve_mega.system.config import Config

T = TypeVar("T")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a deployment; see `load_yaml`."""
    return load_yaml(path, Config, overrides)


def load_yaml(
    path: str | Path | None,
    target: type[T],
    overrides: Sequence[str] = (),
    check: Callable[[T], object] = lambda _: None,
    section: str | None = None,
) -> T:
    """Read a YAML file and apply overrides of the form `section.field=value` (value in YAML).

    Args:
        path: of the file; its top level is a mapping. None stands for an empty one.
        target: the record it describes.
        overrides: applied in order, before validation.
        check: raises ValueError for what only the whole configuration can tell.
        section: the file holds this section of `target` alone; overrides name it all the same.

    Raises:
        ValueError: the file or an override is not valid; the message names which of them, and
            the field.
        OSError: the file cannot be read.
    """
    try:
        text = "{}" if path is None else Path(path).read_text(encoding="utf-8")
        raw = _settings_of(text, section)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for override in overrides:
        try:
            _apply_override(raw, override)
        except ValueError as error:
            raise ValueError(f"--set {override}: {error}") from None

    def checked(plain: object) -> T:
        _refuse_infinity(plain)
        config = convert(plain, target)
        check(config)
        return config

    try:
        return checked(raw)
    except ValueError as error:
        origin = _origin(str(error), _settings_of(text, section), overrides, checked) or path
        raise ValueError(f"{origin or 'configuration'}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own would take the last.

    It takes 1e-3 for a number as well, which YAML 1.1 has as a text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{key.value!r} is there a second time in line {line}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile("[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _refuse_infinity(plain: object, name: str = "") -> None:
    """YAML has infinite numbers; no setting does."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            _refuse_infinity(value, f"{name}.{key}" if name else str(key))
    elif isinstance(plain, float) and math.isinf(plain):
        raise ValueError(f"{name} must be a finite number, got {plain}")


def _settings_of(text: str, section: str | None) -> dict[str, Any]:
    raw = _parse(text)
    if not isinstance(raw, dict):
        raise ValueError("the top level must be a mapping of settings")
    return raw if section is None else {section: raw}


def _origin(
    error: str,
    raw: dict[str, Any],
    overrides: Sequence[str],
    read: Callable[[object], object],
) -> str | None:
    """The override from which on an error is said; None if the file alone brings it."""
    origin, said = None, _error_of(raw, read)
    for override in overrides:
        _apply_override(raw, override)
        before, said = said, _error_of(raw, read)
        if said == error != before:
            origin = f"--set {override}"
    return origin


def _error_of(raw: dict[str, Any], read: Callable[[object], object]) -> str | None:
    try:
        read(raw)
    except ValueError as error:
        return str(error)
    return None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    *sections, leaf = name.strip().split(".")
    if not separator or not leaf:
        raise ValueError("an override has the form section.field=value")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ValueError(f"{section!r} is not a section")
        node = child
    try:
        node[leaf] = _parse(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
