"""From a conversation to running generations, for all endpoints that answer one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request, Response
from pydantic import ValidationError

from fastserve_mega.server.answers import Answer, AnswerShape, respond
from fastserve_mega.server.chat_protocol import ChatRequest
from fastserve_mega.server.dialect import Dialect, describe_tools
from fastserve_mega.server.errors import ApiError, from_validation
from fastserve_mega.server.reasoning import ThinkParser
from fastserve_mega.server.service import Service, structure_of
from fastserve_mega.server.tools.formats import new_call_id
from fastserve_mega.server.tools.pieces import PLAIN_TEXT, ToolParser


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
