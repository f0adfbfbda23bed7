"""POST /v1/embeddings: of a prompt's last token, scaled to length 1."""

from __future__ import annotations

import base64
import uuid
from array import array
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from fastserve_mega.models.generation_config import NO_DEFAULTS, SamplingDefaults
from fastserve_mega.server.answers import Json, respond_whole
from fastserve_mega.server.completions import CompletionRequest, encode_prompts
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.openapi import ERRORS, EmbeddingList
from fastserve_mega.server.service import Service
from fastserve_mega.server.strict import KeptTokens, Neutral, Strict, Texts, TokenIds
from fastserve_mega.types import SamplingParams

_UNSUPPORTED: Neutral = {"dimensions": ()}
"""Models whose first numbers mean something by themselves are trained for that."""


class EmbeddingRequest(Strict):
    """Body of POST /v1/embeddings."""

    unsupported = _UNSUPPORTED
    input: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    """Text or token ids, or several of one kind."""
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    # Extensions, as for completions.
    priority: int | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: KeptTokens | None = None

    def completion(self) -> _Prompts:
        """The completion of the same prompts."""
        asked = self.model_dump(exclude={"input", "encoding_format"})
        return _Prompts.model_construct(prompt=self.input, echo=True, max_tokens=0, **asked)


class _Prompts(CompletionRequest):
    """A completion of which only the prompts' embeddings are told."""

    def sampling_params(
        self, max_tokens: int, number: int = 0, defaults: SamplingDefaults = NO_DEFAULTS
    ) -> SamplingParams:
        return SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, embeds=True)


def embeddings_router(service: Service) -> APIRouter:
    """The endpoint, with its service."""
    router = APIRouter()

    @router.post(
        "/v1/embeddings", responses={200: {"model": EmbeddingList}, 400: ERRORS["4XX"], **ERRORS}
    )
    async def create_embeddings(http: Request, body: EmbeddingRequest) -> Response:
        asked = body.completion()
        await service.check_model(body.model)
        try:
            prompts = await encode_prompts(service, asked)
        except ApiError as error:
            error.body["error"]["param"] = "input"
            raise
        name, decoder = f"embd-{uuid.uuid4().hex}", service.decoder_of(asked)
        answer = await service.begin(http, asked, prompts, answer_id=name, decoder=decoder)

        def whole() -> Json:
            tokens = answer.usage.prompt_tokens
            return {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": written(each.embedding)}
                    for index, each in enumerate(answer.generations)
                ],
                "model": answer.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }

        def written(embedding: bytes) -> str | list[float]:
            if body.encoding_format == "base64":
                return base64.b64encode(embedding).decode()
            return array("f", embedding).tolist()

        return await respond_whole(http, answer, whole)

    return router
