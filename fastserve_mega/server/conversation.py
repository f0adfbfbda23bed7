"""From a conversation to running generations, as the served model reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from pydantic import ValidationError

from fastserve_mega.server.answers import Answer, AnswerShape, respond
from fastserve_mega.server.chat_protocol import ChatRequest
from fastserve_mega.server.errors import ApiError, from_validation
from fastserve_mega.server.reasoning import ThinkMarks, ThinkParser, choose_marks
from fastserve_mega.server.service import Service, structure_of
from fastserve_mega.server.tools.formats import FORMATS, ToolFormat, choose_format, new_call_id
from fastserve_mega.server.tools.harmony import HarmonyParser
from fastserve_mega.server.tools.pieces import PLAIN_TEXT, Functions, ToolParser
from fastserve_mega.system.config import ReasoningParserName, ToolParserName
from fastserve_mega.text.tokenizer import Tokenizer

_HARMONY = FORMATS["harmony"]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one model writes tool calls and reasoning, as its chat template tells."""

    knows_tools: bool
    """The chat template can tell the model of tools."""
    tools: ToolFormat | None
    """How it writes calls; None when that is not known."""
    think: ThinkMarks | None
    """What stands around its reasoning."""
    is_harmony: bool
    """It writes all that it says in channels, whether there are tools or not."""
    tells_reasoning: bool
    """Reasoning is told apart from the answer."""
    efforts: frozenset[str]
    """Variables of the template that say how much is to be thought."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that have to be seen to read an answer."""
        tools = (_HARMONY if self.is_harmony else self.tools) or None
        return (*(tools.marks if tools else ()), *(self.think or ()))

    def effort_variables(self, effort: str) -> Mapping[str, Any]:
        """Variables of the template for OpenAI's reasoning_effort.

        Raises:
            ValueError: the template knows none for it.
        """
        values: dict[str, Any] = {
            "reasoning_effort": effort,
            "enable_thinking": effort != "none",
            "thinking": effort != "none",
        }
        known = {name: value for name, value in values.items() if name in self.efforts}
        if not known and effort != "none":
            raise ValueError(
                f"reasoning_effort={effort!r} has no effect: the model's chat template knows "
                "neither reasoning_effort nor enable_thinking"
            )
        return known

    def new_parser(self, functions: Functions) -> ToolParser:
        """Reads an answer as the model writes it, but for the reasoning between marks.

        Args:
            functions: that it may call; without any, nothing is taken for a call.
        """
        if self.is_harmony:
            return HarmonyParser(tells_reasoning=self.tells_reasoning)
        return self.tools.new_parser(functions) if self.tools and functions else PLAIN_TEXT


def dialect_of(
    tokenizer: Tokenizer,
    tool_parser: ToolParserName = "auto",
    reasoning_parser: ReasoningParserName = "auto",
) -> Dialect:
    """The dialect of a model, as configured and by its chat template."""
    template = tokenizer.chat_template.source if tokenizer.chat_template else None
    variables = tokenizer.chat_template.variables if tokenizer.chat_template else frozenset()
    knows_tools = "tools" in variables
    tools = choose_format(tool_parser, template if knows_tools else None)
    think = choose_marks(reasoning_parser, template)
    by_template = choose_format("auto", template) is _HARMONY and reasoning_parser == "auto"
    return Dialect(
        knows_tools=knows_tools,
        tools=tools,
        think=think,
        is_harmony=_HARMONY in (tools, FORMATS.get(reasoning_parser)) or by_template,
        tells_reasoning=reasoning_parser != "none",
        efforts=variables & {"reasoning_effort", "enable_thinking", "thinking"},
    )


def describe_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """A conversation in which tools, calls and results are text of the common roles.

    For models whose chat template knows nothing of tools.
    Calls are written as those that a request forces are (`RequiredCalls`).

    Args:
        messages: as chat templates with tools know them.
        tools: that may be called.
    """
    plain: list[Message] = []
    for message in messages:
        told = _as_text(message)
        if plain and message["role"] == "tool" and plain[-1]["role"] == "user":
            # Many templates want user and assistant in turn.
            plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{told['content']}"}
        else:
            plain.append(told)
    if tools:
        # The first message has a role that the template knows; a system message may not.
        first = plain[0]
        plain[0] = {**first, "content": f"{_description(tools)}\n\n{first['content']}"}
    return plain


def _as_text(message: Message) -> Message:
    if message["role"] == "tool":
        name = message.get("name", "the call")
        return {"role": "user", "content": f"Result of {name}: {message['content']}"}
    if calls := message.get("tool_calls"):
        told = json.dumps([call["function"] for call in calls], ensure_ascii=False)
        content = f"{message['content']}\n{told}" if message["content"] else told
        return {"role": message["role"], "content": content}
    return message


def _description(tools: Sequence[dict[str, Any]]) -> str:
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    return "\n".join(["You can call these functions:", *lines])


class Conversations:
    """Answers conversations with the served model.

    Args:
        service: what it needs.
        dialect: of the model.
    """

    def __init__(self, service: Service, dialect: Dialect) -> None:
        self.service = service
        self.new_call_id = dialect.tools.new_call_id if dialect.tools else new_call_id
        """Names a tool call."""
        self._dialect = dialect

    @staticmethod
    def chat_request(body: Mapping[str, Any]) -> ChatRequest:
        """The chat completion that another API's request amounts to."""
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            raise from_validation(errors, body) from None

    async def render(self, body: ChatRequest) -> tuple[str, list[int]]:
        """The conversation as the model reads it: as text, and its tokens."""
        dialect = self._dialect
        if body.continue_final_message and dialect.is_harmony:
            raise ApiError(
                400,
                "continue_final_message is not supported for this model, which writes in channels",
                param="continue_final_message",
            )
        if body.offered_tools and not body.forces_call and dialect.tools is None:
            raise ApiError(
                400,
                "tools are not supported with tool_choice='auto': the model's chat template has "
                "none, or server.tool_parser does not say how it writes calls; a call that "
                "tool_choice forces is",
                param="tools",
            )
        try:
            messages, tools = body.plain_messages(), body.offered_tools
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        if not dialect.knows_tools:
            messages, tools = describe_tools(messages, tools), []
        variables = self._variables(body)
        return await self.service.render_chat(messages, tools, variables, body.prompt_end)

    async def answer(
        self,
        http: Request,
        body: ChatRequest,
        shape: Callable[[Answer, Callable[[], ToolParser]], AnswerShape],
        answer_id: str,
    ) -> Response:
        """Answer a conversation in the shape of an endpoint.

        Args:
            http: the request.
            body: of the request, in the form of a chat completion.
            shape: writes the answer; it is given what makes a parser for one generation.
            answer_id: names it.
        """
        await self.service.check_model(body.model)
        text, prompt = await self.render(body)
        fitting = await self.service.fit(body, prompt, body.max_tokens_asked)
        is_structured = structure_of(body) is not None
        think = self._dialect.think
        after = self.service.tokenizer.token_id(think.end) if think else None
        opened = think is not None and think.opened_by(text, _begun(body))
        # A form begins behind the reasoning, where the prompt has begun that.
        structure_after = after if is_structured and opened else None

        def new_parser() -> ToolParser:
            if not is_structured:
                parser = self._dialect.new_parser(body.functions)
            else:
                parser = body.forced_parser() if body.forces_call else PLAIN_TEXT
            if think is None or (is_structured and structure_after is None):
                return parser
            return ThinkParser(think, parser, opened=opened)

        answer = await self.service.begin(
            http,
            body,
            [fitting],
            answer_id=answer_id,
            decoder=self.service.decoder_of(body, self._dialect.marks),
            structure_after=structure_after,
        )
        return await respond(http, answer, shape(answer, new_parser))

    def _variables(self, body: ChatRequest) -> Mapping[str, Any]:
        """Return the template's, as the request sets them; the more exact way of asking wins."""
        try:
            effort = body.reasoning_effort
            of_effort = self._dialect.effort_variables(effort) if effort else {}
        except ValueError as error:
            raise ApiError(400, str(error), param="reasoning_effort") from None
        return {**of_effort, **(body.chat_template_kwargs or {})}


def _begun(body: ChatRequest) -> str:
    """What there is of the answer already."""
    return body.messages[-1].text if body.continue_final_message else ""
