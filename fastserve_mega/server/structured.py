"""The ways in which OpenAI and vLLM ask for structured output."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastserve_mega.types import StructuredOutput

_ANY_OBJECT = {"type": "object"}
Schema = dict[str, Any] | bool | str
"""A JSON schema, or its text."""
# All lists of a body end at their first wrong element: pydantic would tell of each of them.
Texts = Annotated[list[str], Field(fail_fast=True)]
MAX_FIELDS = 128
"""In an object of a body. Each one that is unknown costs an error message."""


def refuse_many_fields(data: object) -> None:
    """Look at the number of an object's fields before pydantic looks at each of them.

    Raises:
        ValueError: there are too many.
    """
    if isinstance(data, dict) and len(data) > MAX_FIELDS:
        raise ValueError(f"an object has at most {MAX_FIELDS} fields, got {len(data)}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        refuse_many_fields(data)
        return data


class TextFormat(_Strict):
    """No form at all."""

    type: Literal["text"]

    def structured(self) -> StructuredOutput | None:
        return None


class JsonObjectFormat(_Strict):
    """Some JSON object."""

    type: Literal["json_object"]

    def structured(self) -> StructuredOutput | None:
        return from_schema(_ANY_OBJECT)


class NamedSchema(_Strict):
    """A JSON schema as OpenAI wraps it. It is always kept to, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def structured(self) -> StructuredOutput | None:
        return from_schema(self.json_schema.schema_)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(_Strict):
    """vLLM's newer form of guided_json, guided_regex and guided_choice."""

    json_: Schema | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: Texts | None = None
    json_object: bool | None = None

    def structured(self) -> StructuredOutput | None:
        found = all_forms(self.json_, self.regex, self.choice)
        return only_one([*found, *([from_schema(_ANY_OBJECT)] if self.json_object else [])])


def all_forms(
    schema: Schema | None, regex: str | None, choice: list[str] | None
) -> list[StructuredOutput]:
    """The forms that vLLM's fields ask for, those of `guided_` names too."""
    return [
        *([from_schema(schema)] if schema is not None else []),
        *([StructuredOutput(regex=regex)] if regex is not None else []),
        *([StructuredOutput(choice=tuple(choice))] if choice is not None else []),
    ]


def from_schema(schema: Schema) -> StructuredOutput:
    """Output that satisfies a JSON schema."""
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return StructuredOutput(json_schema=text)


def only_one(found: list[StructuredOutput]) -> StructuredOutput | None:
    """The form asked for, if any.

    Raises:
        ValueError: several are asked for.
    """
    if len(found) > 1:
        raise ValueError(f"ask for one structure of the output, got {len(found)}")
    return found[0] if found else None
