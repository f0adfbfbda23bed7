"""Which way of writing calls a model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastserve_mega.server.tools.hermes import HermesParser
from fastserve_mega.server.tools.llama3_json import Llama3JsonParser
from fastserve_mega.server.tools.pieces import ToolParser
from fastserve_mega.system.config import ToolParserName

PARSERS: Mapping[str, Callable[[], ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
}
_SIGNS = {
    "hermes": ("<tool_call>",),
    "llama3_json": ("<|python_tag|>", "Environment: ipython", '"parameters": dictionary'),
}
"""What the chat templates of a family have in them."""


def choose_parser(name: ToolParserName, template: str | None) -> Callable[[], ToolParser] | None:
    """The parser of a model; None when its calls are not understood, or are not wanted.

    Args:
        name: as configured; `auto` goes by the template.
        template: the chat template; None when it knows nothing of tools.
    """
    if template is None:
        return None
    if name != "auto":
        return PARSERS.get(name)
    for family, signs in _SIGNS.items():
        if any(sign in template for sign in signs):
            return PARSERS[family]
    return None
