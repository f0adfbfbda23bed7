"""From a request's body to running generations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from msgspec.structs import replace

from fastserve_mega.client import AsyncClient
from fastserve_mega.models.generation_config import NO_DEFAULTS, SamplingDefaults
from fastserve_mega.server.answers import Answer
from fastserve_mega.server.api_keys import KeyHolder
from fastserve_mega.server.errors import ApiError, invalid_value
from fastserve_mega.server.middleware import IDEMPOTENCY_KEY, identity_of
from fastserve_mega.server.protocol import GenerationRequest
from fastserve_mega.server.structure_check import StructureChecker
from fastserve_mega.text.chat_template import PromptEnd
from fastserve_mega.text.detokenizer import TokenDecoder
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import SamplingParams, StructuredOutput

T = TypeVar("T")
_MESSAGE_LENGTH = 200
"""Characters that cost as much as a message does, besides its text."""
_LONG_TEXT = 2_000
"""Characters from which tokenizing goes to a thread; below, the switch costs more than the work."""


async def one_by_one(items: Iterable[T]) -> AsyncIterator[tuple[int, T]]:
    """Number the items; between two of them others have their turn."""
    for index, item in enumerate(items):
        if index:
            await asyncio.sleep(0)
        yield index, item


def structure_of(body: GenerationRequest) -> StructuredOutput | None:
    """The form that a request wants its output held to, or say what is wrong with it."""
    try:
        return body.structured_output
    except RecursionError:
        raise ApiError(400, "the JSON schema is nested too deeply") from None
    except ValueError as error:
        raise invalid_value(str(error)) from None


class Service:
    """What the endpoints need: the client of the coordinator, and the tokenizer.

    Args:
        client: of the coordinator.
        tokenizer: of the served model.
        defaults: stand for the values that a request does not give.
    """

    def __init__(
        self,
        client: AsyncClient,
        tokenizer: Tokenizer,
        defaults: SamplingDefaults = NO_DEFAULTS,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self._defaults = defaults
        self._structures = StructureChecker()

    async def aclose(self) -> None:
        """Close the client, and end what was started for this one."""
        self._structures.close()
        await self.client.aclose()

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, without holding up other requests."""
        self._refuse_long(len(text), (await self.client.info()).max_context)
        encode = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._tokenize(encode, len(text))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text that the model has written."""
        return len(self.tokenizer.encode(text, add_special_tokens=False)) if text else 0

    def decoder_of(self, body: GenerationRequest, marks: Collection[str] = ()) -> TokenDecoder:
        """What makes the text of an answer, with all special tokens or only with `marks`."""
        if body.skip_special_tokens is False:
            return self.tokenizer.showing_all()
        return self.tokenizer.showing(marks)

    async def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        end: PromptEnd = "answer",
    ) -> tuple[str, list[int]]:
        """A conversation as the model reads it: as text, and its tokens.

        Others are not held up.
        """
        length = sum(len(message["content"]) for message in messages)
        max_context = (await self.client.info()).max_context
        self._refuse_long(length, max_context)

        def render() -> tuple[str, list[int]]:
            text = self.tokenizer.render_chat(messages, tools, variables, end)
            # Tools and variables make it longer than its messages are.
            self._refuse_long(len(text), max_context)
            return text, self.tokenizer.encode(text, add_special_tokens=False)

        work = length + _MESSAGE_LENGTH * len(messages)
        return await self._tokenize(render, _LONG_TEXT if tools else work)

    def _refuse_long(self, characters: int, max_context: int) -> None:
        """Refuse text that is too long in whatever way it is tokenized."""
        longest = self.tokenizer.longest_token
        if characters > max_context * longest:
            raise ApiError(
                400,
                f"the prompt has {characters} characters; the context is {max_context} tokens, "
                f"of at most {longest} characters each",
                param="prompt",
                code="context_length_exceeded",
            )

    async def _tokenize(self, encode: Callable[[], T], length: int) -> T:
        try:
            return encode() if length < _LONG_TEXT else await asyncio.to_thread(encode)
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    async def check_model(self, name: str | None) -> str:
        """The served model's name; a request for another one is refused, one for none is not."""
        served = (await self.client.info()).model_name
        if name and name != served:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; the served model is {served!r}",
                param="model",
                code="model_not_found",
            )
        return served

    async def fit(
        self, body: GenerationRequest, prompt: Sequence[int], max_tokens: int | None
    ) -> tuple[Sequence[int], int]:
        """Check a prompt, cut to the end that `truncate_prompt_tokens` keeps of it.

        Returns:
            The prompt and `max_tokens`, or what fits into the context if that is None.
        """
        welcome = await self.client.info()
        if (kept := body.truncate_prompt_tokens) is not None:
            room = welcome.max_context - (max_tokens or 1)
            prompt = prompt[-max(room if kept == -1 else kept, 1) :]
        if not prompt:
            raise ApiError(400, "the prompt is empty", param="prompt")
        room = welcome.max_context - len(prompt)
        # Before anything is done for each of the tokens.
        if room < 1 or (max_tokens is not None and max_tokens > room):
            raise ApiError(
                400,
                f"the context is {welcome.max_context} tokens for prompt and answer together; "
                f"the prompt has {len(prompt)} and max_tokens is {max_tokens or 'at least 1'}",
                param="max_tokens" if room >= 1 else "prompt",
                code="context_length_exceeded",
            )
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < welcome.vocab_size:
                raise ApiError(
                    400,
                    f"token id {token} is not in the vocabulary of {welcome.vocab_size}",
                    param="prompt",
                )
        return prompt, room if max_tokens is None else max_tokens

    async def end_token_ids(self, body: GenerationRequest) -> frozenset[int]:
        """Token ids after which an answer ends, and which are no part of it."""
        ends = frozenset(body.stop_token_ids or ())
        if body.ignore_eos:
            return ends
        return ends | frozenset((await self.client.info()).eos_token_ids)

    async def begin(
        self,
        http: Request,
        body: GenerationRequest,
        prompts: Sequence[tuple[Sequence[int], int]],
        *,
        answer_id: str,
        decoder: TokenDecoder,
        structure_after: int | None = None,
    ) -> Answer:
        """Begin to answer prompts, each with its own max_tokens, within the limits of the key.

        Args:
            http: the request.
            body: of the request.
            prompts: token ids and max_tokens of each.
            answer_id: names its generations to the coordinator.
            decoder: makes text of tokens.
            structure_after: the token behind which the output is held to the form asked for; None
                is from its beginning.
        """
        request_id, fingerprint = answer_id, ""
        if IDEMPOTENCY_KEY in http.headers:
            request_id, fingerprint = await identity_of(http)
        submissions = await self._submissions(body, prompts, structure_after)
        holder: KeyHolder | None = getattr(http.state, "key_holder", None)
        client, weight, priority = body.client, 1.0, body.priority or 0
        if holder is not None:
            client, weight = f"key:{holder.key.name}", holder.key.weight
            priority = holder.priority_of(body.priority)
        prompt_tokens = sum(len(prompt) for prompt, _ in prompts)
        admitted = holder.admit(prompt_tokens, len(submissions)) if holder else None
        try:
            generations = [
                await self.client.submit(
                    prompt,
                    params,
                    stop=body.stops,
                    cache_salt=body.cache_salt or "",
                    timeout_s=body.timeout,
                    request_id=f"{request_id}-{index}",
                    fingerprint=fingerprint,
                    decoder=decoder,
                    continues_text=body.continues_text,
                    tells_stop=bool(body.include_stop_str_in_output),
                    expected_output_tokens=body.expected_output_tokens,
                    session=body.session or "",
                    client=client,
                    weight=weight,
                    priority=priority,
                )
                async for index, (prompt, params) in one_by_one(submissions)
            ]
        except BaseException:
            if admitted:
                admitted.end(0)
            raise
        on_end = admitted.end if admitted else None
        model = (await self.client.info()).model_name
        answer = Answer(body, answer_id, model, generations, on_end)
        http.state.answer = answer  # for those who trace it
        return answer

    async def _submissions(
        self,
        body: GenerationRequest,
        prompts: Sequence[tuple[Sequence[int], int]],
        structure_after: int | None,
    ) -> list[tuple[Sequence[int], SamplingParams]]:
        """Each prompt as often as it is answered, with how that is sampled."""
        structured = structure_of(body)
        sampling, spell = body.sampling_params, self.tokenizer.spellings
        try:
            bad = tuple(each for word in body.bad_words or () for each in spell(word))
            submissions = [
                (prompt, replace(sampling(max_tokens, number, self._defaults), bad_words=bad))
                async for _, (prompt, max_tokens) in one_by_one(prompts)
                async for number, _ in one_by_one(range(body.answers_per_prompt))
            ]
            if structured is not None:
                await self._structures.check(structured)
        except ValueError as error:
            raise invalid_value(str(error)) from None
        if structured is None or structure_after is None:
            return submissions
        structured = replace(structured, after=structure_after)
        return [(prompt, replace(p, structured=structured)) for prompt, p in submissions]
