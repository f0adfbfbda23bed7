"""Tools, and calls of them, as the body of a chat completion describes them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from fastserve_mega.server.strict import Strict, short

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
    cache_control: dict[str, Any] | None = None
    """Without effect: all prefixes are cached."""


class FunctionName(Strict):
    """The function that is to be called."""

    name: str


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class SomeTools(Strict):
    """Tools that may, or must, be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1)]


class AllowedTools(Strict):
    """Only some of the tools are allowed."""

    type: Literal["allowed_tools"]
    allowed_tools: SomeTools

    @property
    def names(self) -> set[str]:
        return {tool.function.name for tool in self.allowed_tools.tools}


class CalledFunction(Strict):
    """Name and arguments of a call, as the assistant gave them."""

    name: str
    arguments: str | dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: they write the arguments themselves."""
        if isinstance(self.arguments, dict):
            return {"name": self.name, "arguments": self.arguments}
        try:
            # Some clients write null for no arguments, as some models do.
            arguments = json.loads(self.arguments or "{}") or {}
        except (ValueError, RecursionError):
            raise ValueError(
                f"the arguments of a call of {self.name} are not valid JSON: "
                f"{short(self.arguments)}"
            ) from None
        return {"name": self.name, "arguments": arguments}


class ToolCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Which call of its answer it was: clients that put a stream together send it back."""
