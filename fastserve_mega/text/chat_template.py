"""The chat template of a model: a Jinja program from its directory, which may be anybody's.

What a template may rely on (its variables, functions and filters) is what transformers gives it,
as templates are written for that. It runs in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from jinja2 import Environment, Template, TemplateError, meta
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

_DEFAULT, _TOOLS = "default", "tool_use"
_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt"}
_CUT = "\ue000the rest is to come\ue000"
"""Put behind a message that goes on, to find its end in what the template writes."""
PromptEnd = Literal["answer", "open message", "closed message"]
"""How a conversation ends: where the assistant's answer begins, within its last message, which goes
on, or behind that."""


class ChatTemplate:
    """Writes a conversation as the text that a model was trained on.

    Args:
        source: in Jinja.
        tools_source: for conversations with tools, where that is another one.
        special_tokens: variables such as `bos_token`.
    """

    def __init__(
        self,
        source: str,
        tools_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._source = source
        self._tools_source = tools_source or source
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, directory: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """Read the template of a directory; None if there is none.

        Args:
            directory: with `chat_template.jinja` and `additional_chat_templates`, if any; or with
                `chat_template.json`, as models have it that see images as well.
            settings: from its tokenizer_config.json, with `chat_template` otherwise: a text, or
                several with names.
        """
        given = settings.get("chat_template")
        if given is None and (path := directory / "chat_template.json").is_file():
            given = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        named = {_DEFAULT: given} if isinstance(given, str) else {}
        if isinstance(given, list):
            named = {str(each["name"]): str(each["template"]) for each in given}
        if (path := directory / "chat_template.jinja").is_file():
            named[_DEFAULT] = path.read_text(encoding="utf-8")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            named[path.stem] = path.read_text(encoding="utf-8")
        if _DEFAULT not in named:
            return None
        return cls(named[_DEFAULT], named.get(_TOOLS), special_tokens(settings))

    @property
    def source(self) -> str:
        """The text of the template, of the one for conversations with tools if it is another."""
        return self._tools_source

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads; empty when it is no valid one."""
        try:
            return frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source)))
        except TemplateError:
            return frozenset()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        end: PromptEnd = "answer",
    ) -> str:
        """The conversation, by default up to where the assistant's answer begins.

        Where the template refuses it, as many do that want one system message at the beginning and
        then user and assistant in turn, it is tried with what one role says joined; where that is
        refused as well, with the system's words before those of the user.

        Args:
            messages: of the conversation.
            tools: that may be called.
            variables: further ones that the template reads, by their names.
            end: of the conversation; a message that goes on must have text.

        Raises:
            ValueError: the template refuses the messages, or is no valid one; or a variable is one
                of the conversation's own.
        """
        try:
            return self._render(messages, tools, variables, end)
        except ValueError:
            for other in _other_forms(messages):
                with suppress(ValueError):
                    return self._render(other, tools, variables, end)
            raise

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None,
        end: PromptEnd,
    ) -> str:
        given = dict(variables or {})
        if reserved := sorted(given.keys() & (_OWN_VARIABLES | self._special_tokens.keys())):
            raise ValueError(f"the chat template's {reserved[0]!r} is not for a request to set")
        told = [dict(message) for message in messages]
        if end == "open message":
            told[-1]["content"] += _CUT
        try:
            template = self._with_tools if tools else self._plain
            text = template.render(
                messages=told,
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=end == "answer",
                **self._special_tokens,
                **given,
            )
            return _before_cut(text) if end == "open message" else text
        except RecursionError:
            raise ValueError("the messages or tools are nested too deeply") from None
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            # Not all templates check what they are given before they use it.
            raise ValueError(f"the model's chat template refuses the messages: {error}") from None

    @cached_property
    def _plain(self) -> Template:
        return _ENVIRONMENT.from_string(self._source)

    @cached_property
    def _with_tools(self) -> Template:
        return _ENVIRONMENT.from_string(self._tools_source)


def _other_forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Ways to say the same with fewer messages, if there are any."""
    system = [message for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    first = [{"role": "system", "content": _lines(system)}] if system else []
    if (joined := _joined([*first, *others])) != list(messages):
        yield joined
    if system:
        yield _joined([{**first[0], "role": "user"}, *others])


def _joined(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in which what user or assistant say in a row is one message."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else {"role": ""}
        if message["role"] != last["role"] or last["role"] not in ("user", "assistant"):
            joined.append(dict(message))
            continue
        joined[-1] = {**last, **message, "content": _lines([last, message])}
        if calls := [*(last.get("tool_calls") or ()), *(message.get("tool_calls") or ())]:
            joined[-1]["tool_calls"] = calls
    return joined


def _lines(messages: Sequence[Mapping[str, Any]]) -> str:
    """What messages say, one below the other."""
    return "\n\n".join(message["content"] for message in messages if message["content"])


def _before_cut(text: str) -> str:
    before, *after = text.split(_CUT)
    if len(after) != 1:
        raise ValueError("the last one cannot be gone on with, as it does not stand there as it is")
    return before


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Those that a tokenizer_config.json names, such as `bos_token`, by that name."""
    tokens = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if re.fullmatch(r"[a-z_]+_token", name) and isinstance(content, str):
            tokens[name] = content
    return tokens


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - declared as a set of Jinja's

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Macro) -> str:
        return str(caller())


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter of this name escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _make_environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _make_environment()
