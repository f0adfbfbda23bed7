"""What the bodies of all requests have in common: nothing in them is ignored silently."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# All lists of a body end at their first wrong element: pydantic would tell of each of them.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


def _something(kept: int) -> int:
    if kept < 1 and kept != -1:
        raise ValueError(f"at least 1 token is kept, or with -1 all that fit; got {kept}")
    return kept


KeptTokens = Annotated[int, AfterValidator(_something)]
Neutral = dict[str, tuple[Any, ...]]
"""Fields of OpenAI and vLLM that are not supported, with the values that ask for nothing; null
always does."""
MAX_FIELDS = 128
"""In an object of a body. Each one that is unknown costs an error message."""


class Strict(BaseModel):
    """Refuses unknown fields, wrong types, and what we do not support."""

    model_config = ConfigDict(extra="forbid", strict=True)
    unsupported: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        refuse_many_fields(data)
        for name, value in data.items():
            if name not in cls.unsupported or value is None:
                continue
            if value not in cls.unsupported[name]:
                raise ValueError(f"{name}={short(value)} is not supported")
        return {name: value for name, value in data.items() if name not in cls.unsupported}


def refuse_many_fields(data: object) -> None:
    """Look at the number of an object's fields before pydantic looks at each of them.

    Raises:
        ValueError: there are too many.
    """
    if isinstance(data, dict) and len(data) > MAX_FIELDS:
        raise ValueError(f"an object has at most {MAX_FIELDS} fields, got {len(data)}")


def short(value: Any) -> str:
    """A wrong value, as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
