"""Reads configurations from YAML, with strict validation and one sentence for what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastserve_mega.config import Config
from fastserve_mega.strict import from_plain

T = TypeVar("T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a deployment; see `load_yaml`."""
    return load_yaml(path, Config, overrides)


def load_yaml(path: str | Path, target: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a YAML file and apply overrides of the form `section.field=value` (value in YAML).

    Args:
        path: of the file; its top level is a mapping.
        target: the dataclass it describes.
        overrides: applied in order, before validation.

    Raises:
        ValueError: the file or an override is not valid; the message names file and field.
        OSError: the file cannot be read.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("the top level must be a mapping of sections")
        for override in overrides:
            _apply_override(raw, override)
        return from_plain(raw, target)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    *sections, leaf = name.strip().split(".")
    if not separator or not leaf:
        raise ValueError(f"an override has the form section.field=value, got {override!r}")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {section!r} is not a section")
        node = child
    node[leaf] = yaml.safe_load(text)
