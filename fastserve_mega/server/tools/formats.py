"""Which way of writing calls a model has."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastserve_mega.server.tools import harmony, mistral
from fastserve_mega.server.tools.hermes import HermesParser
from fastserve_mega.server.tools.llama3_json import Llama3JsonParser
from fastserve_mega.server.tools.pieces import Functions, ToolParser
from fastserve_mega.server.tools.qwen3_coder import Qwen3CoderParser
from fastserve_mega.system.config import ToolParserName

_ALPHANUMERIC = string.ascii_letters + string.digits


def new_call_id() -> str:
    """An id as OpenAI's are."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _new_mistral_id() -> str:
    """Mistral's templates take no others."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls."""

    new_parser: Callable[[Functions], ToolParser]
    """Reads an answer; it is told which functions may be called."""
    signs: tuple[str, ...]
    """What the chat templates of the family have in them."""
    marks: tuple[str, ...] = ()
    """Special tokens that the parser has to see."""
    new_call_id: Callable[[], str] = new_call_id


FORMATS: Mapping[str, ToolFormat] = {
    "harmony": ToolFormat(
        lambda _: harmony.HarmonyParser(), signs=("<|channel|>",), marks=harmony.MARKS
    ),
    "qwen3_coder": ToolFormat(Qwen3CoderParser, signs=("<function=",), marks=("<tool_call>",)),
    "hermes": ToolFormat(
        lambda _: HermesParser(), signs=("<tool_call>",), marks=("<tool_call>", "</tool_call>")
    ),
    "mistral": ToolFormat(
        lambda _: mistral.MistralParser(),
        signs=("[TOOL_CALLS]",),
        marks=mistral.MARKS,
        new_call_id=_new_mistral_id,
    ),
    "llama3_json": ToolFormat(
        lambda _: Llama3JsonParser(),
        signs=("<|python_tag|>", "Environment: ipython", '"parameters": dictionary'),
        marks=("<|python_tag|>",),
    ),
}
"""In the order in which a template is looked at: some have the signs of two."""


def choose_format(name: ToolParserName, template: str | None) -> ToolFormat | None:
    """The format of a model; None when its calls are not understood, or are not wanted.

    Args:
        name: as configured; `auto` goes by the template.
        template: the chat template; None when it knows nothing of tools.
    """
    if template is None:
        return None
    if name != "auto":
        return FORMATS.get(name)
    for family in FORMATS.values():
        if any(sign in template for sign in family.signs):
            return family
    return None
