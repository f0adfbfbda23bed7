"""How a model wants to be sampled: its generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastserve_mega.models.fields import read_json
from fastserve_mega.records import Record
from fastserve_mega.types import SamplingParams

_PENALTY = "repetition_penalty"


class SamplingDefaults(Record, frozen=True, kw_only=True):
    """What stands for the values that a request does not give."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0


NO_DEFAULTS = SamplingDefaults()
"""All tokens, as probable as the model says."""


def load_sampling_defaults(directory: Path) -> SamplingDefaults:
    """Read generation_config.json; without it, or without a value in it, nothing is changed.

    Raises:
        ValueError: it is not valid, or a value is out of range; the message names file and value.
    """
    path = directory / "generation_config.json"
    config = read_json(path) or {}
    given: dict[str, Any] = {
        name: config[name]
        for name in SamplingDefaults.__struct_fields__
        if config.get(name) is not None
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if config.get("do_sample") is False:
        # As transformers does: the other values are for sampling.
        given = {"temperature": 0.0, **{k: v for k, v in given.items() if k == _PENALTY}}
    for name, value in given.items():
        number = int if name == "top_k" else int | float
        if isinstance(value, bool) or not isinstance(value, number):
            raise ValueError(f"{path}: {name} must be a number, got {value!r}")
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return SamplingDefaults(**given)
