"""Typed access to config.json, with one clear sentence for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_OF_ALL_PARTS = ("quantization_config", "tie_word_embeddings")
"""Fields that may stand beside text_config in place of in it."""


class Fields:
    """The values of one config.json.

    A field that is absent or null takes its default; without a default that is an error.
    All methods raise ValueError, naming the field and what it holds.
    """

    def __init__(
        self,
        config: dict[str, Any],
        architecture: str,
        eos_token_ids: tuple[int, ...],
        context: int | None = None,
    ) -> None:
        self._config = config
        self.architecture = architecture
        self.eos_token_ids = eos_token_ids
        self.context = context
        """Tokens of the longest request; None: as many as the model can attend to."""

    def raw(self, name: str) -> Any:
        """The value as it is in the file, None when absent."""
        return self._config.get(name)

    def has(self, name: str) -> bool:
        """Whether the file names the field at all, be it null."""
        return name in self._config

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Either true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, got {value!r}")
        return value

    def whole_numbers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers that are not negative, None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self._value(name, None)
        if not isinstance(value, list) or not all(
            isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in value
        ):
            raise ValueError(f"{name} must be a list of positive numbers, got {value!r}")
        return tuple(map(float, value))

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{name} must be a list of strings, got {value!r}")
        return tuple(value)

    def with_defaults(self, defaults: dict[str, Any]) -> Fields:
        """The same with values for what is absent or null."""
        named = {name: value for name, value in self._config.items() if value is not None}
        config = {**self._config, **defaults, **named}
        return Fields(config, self.architecture, self.eos_token_ids, self.context)

    def section(self, name: str) -> Fields | None:
        """A nested object, None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {value!r}")
        return Fields(value, self.architecture, self.eos_token_ids, self.context)

    def require(self, name: str, supported: Any, default: Any) -> None:
        """Refuse a variant of the architecture that this code does not compute."""
        value = self._config.get(name, default)
        if value != supported:
            raise ValueError(f"{name}={value!r} is not supported, only {supported!r}")

    def _value(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{name} is missing")
        return value


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON object of a file; None when there is no file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_eos_token_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Union of generation_config.json and config.json: either may name tokens that the other lacks.

    Raises:
        ValueError: what a file names are no token ids.
    """
    path, described = directory / "generation_config.json", directory / "config.json"
    sources = [(path, read_json(path) or {}), (described, config)]
    if isinstance(text := config.get("text_config"), dict):
        sources.append((described, text))
    found: dict[int, None] = {}
    for named, source in sources:
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ValueError(f"{named}: eos_token_id must hold token ids, got {value!r}")
            found[token] = None
    return tuple(found)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """What describes the text model, in a model that sees images as well, else all of it.

    Raises:
        ValueError: text_config is no object.
    """
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, dict):
        raise ValueError(f"text_config must be an object, got {text!r}")
    return {**{name: config[name] for name in _OF_ALL_PARTS if name in config}, **text}
