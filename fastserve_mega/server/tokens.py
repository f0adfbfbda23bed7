"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter

from fastserve_mega.server.answers import Json
from fastserve_mega.server.chat_protocol import Messages
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.protocol import Strict, TokenIds
from fastserve_mega.server.service import Service


class TokenizeRequest(Strict):
    """Body of POST /tokenize: a text, or a conversation that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


def tokens_router(service: Service) -> APIRouter:
    """The two endpoints, with their service."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Json:
        await service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "send either prompt or messages", param="prompt")
        if body.prompt is not None:
            tokens = await service.encode(body.prompt)
        else:
            try:
                messages = [message.plain() for message in body.messages or ()]
            except ValueError as error:
                raise ApiError(400, str(error), param="messages") from None
            tokens = (await service.render_chat(messages)).token_ids
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
        return {"prompt": service.tokenizer.decode(body.tokens)}

    return router
