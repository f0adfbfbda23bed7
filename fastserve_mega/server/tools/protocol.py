"""Tools as the body of a chat completion describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fastserve_mega.server.protocol import Strict

MAX_TOOLS = 128


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Calls that tool_choice forces are always kept to the schema, others never."""

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        known = {"description": self.description, "parameters": self.parameters}
        given = {name: value for name, value in known.items() if value is not None}
        return {"name": self.name, **given}


class Tool(Strict):
    """A tool as OpenAI describes it."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The function that is to be called."""

    name: str


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName
