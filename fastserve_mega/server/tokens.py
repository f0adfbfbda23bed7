"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from fastserve_mega.server.answers import Json
from fastserve_mega.server.conversation import Conversations
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.strict import Strict, TokenIds


class TokenizeRequest(Strict):
    """Body of POST /tokenize: a text, or a conversation that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    """These and the following as in a chat completion, which looks at them."""
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    """To a text, as by default; a template writes those of a conversation."""

    @property
    def conversation(self) -> dict[str, Any]:
        """What there is of the body of a chat completion with this prompt."""
        return self.model_dump(exclude={"model", "prompt", "add_special_tokens"}, exclude_none=True)


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


def tokens_router(conversations: Conversations) -> APIRouter:
    """The two endpoints."""
    router = APIRouter()
    service = conversations.service

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Json:
        await service.check_model(body.model)
        if (body.prompt is None) == (not body.conversation):
            raise ApiError(400, "send either prompt or messages", param="prompt")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            tokens = await service.encode(body.prompt, add_special_tokens=special)
        else:
            asked = conversations.chat_request(
                {**body.conversation, "add_special_tokens": body.add_special_tokens}
            )
            _, tokens = await conversations.render(asked)
        welcome = await service.client.info()
        return {"tokens": tokens, "count": len(tokens), "max_model_len": welcome.max_context}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Json:
        await service.check_model(body.model)
        vocab_size = (await service.client.info()).vocab_size
        for token in (min(body.tokens, default=0), max(body.tokens, default=0)):
            if not 0 <= token < vocab_size:
                raise ApiError(
                    400, f"token id {token} is not in the vocabulary of {vocab_size}",
                    param="tokens",
                )  # fmt: skip
        return {"prompt": service.tokenizer.showing_all().decode(body.tokens)}

    return router
