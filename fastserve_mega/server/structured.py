"""The ways in which OpenAI and vLLM ask for structured output."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from fastserve_mega.server.strict import Strict, Texts
from fastserve_mega.types import StructuredOutput

_ANY_OBJECT = {"type": "object"}
Schema = dict[str, Any] | bool | str
"""A JSON schema, or its text."""


class TextFormat(Strict):
    """No form at all."""

    type: Literal["text"]

    def structured(self) -> StructuredOutput | None:
        return None


class JsonObjectFormat(Strict):
    """Some JSON object."""

    type: Literal["json_object"]

    def structured(self) -> StructuredOutput | None:
        return from_schema(_ANY_OBJECT)


class NamedSchema(Strict):
    """A JSON schema as OpenAI wraps it. It is always kept to, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def structured(self) -> StructuredOutput | None:
        return from_schema(self.json_schema.schema_)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(Strict):
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
