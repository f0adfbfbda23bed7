"""Steps that are computed before the first request, for what they take and what they compile."""

from __future__ import annotations

from msgspec import structs

from fastserve_mega.system.config import Config
from fastserve_mega.types import MAX_TOP_LOGPROBS, RequestId, SamplingParams
from fastserve_mega.worker.model_runner import SequenceInput

_DECODED_TOKENS = 65_536
"""Context of all decoding sequences of the largest step together; a pool may hold more, but what a
step takes for that is small where kernels attend."""
_LAST_VARIANT = 8_192
"""Tokens of context from which on a kernel is not compiled in any other way."""
_PLAIN = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9)
_CHANGED = structs.replace(_PLAIN, min_tokens=1, logprobs=MAX_TOP_LOGPROBS)
"""Samples from a copy of the logits in float32, and tells of more than the token."""
_CHUNK = 17
_ANY_BLOCK = 1
"""All KV is in one block, whatever it holds."""


def largest_steps(config: Config, max_context: int) -> tuple[list[SequenceInput], ...]:
    """Steps that take the most memory: a chunk at the end of the longest context, and decodes.

    Of each of these the logits are changed, and told.
    """
    tokens = min(config.scheduler.max_batch_tokens, max_context)
    count = config.scheduler.max_batch_size
    context = max(min(max_context, _DECODED_TOKENS // count), 1)
    chunk = _sequence(config, tokens, max_context)
    return [chunk], [_sequence(config, 1, context, _CHANGED) for _ in range(count)]


def varied_steps(config: Config, max_context: int) -> list[list[SequenceInput]]:
    """Steps for which each kernel is compiled in all ways that occur, so that no request waits.

    A step decodes and computes a part of a prompt; contexts double, for how many programs attend to
    one depends on its length. Then one is sampled from logits that were changed.
    """
    last = min(max_context, _LAST_VARIANT)
    contexts = [1 << power for power in range(last.bit_length())]
    chunk = _sequence(config, min(_CHUNK, max_context), min(_CHUNK, max_context))
    steps = [[_sequence(config, 1, context), chunk] for context in contexts]
    return [*steps, [_sequence(config, 1, 1, _CHANGED)]]


def _sequence(
    config: Config, tokens: int, context: int, params: SamplingParams = _PLAIN
) -> SequenceInput:
    return SequenceInput(
        request_id=RequestId("trial"),
        token_ids=[0] * tokens,
        start=context - tokens,
        block_table=[_ANY_BLOCK] * -(-context // config.kv_cache.block_size),
        samples=True,
        params=params,
        seed=0,
        prompt_tokens=context,
    )
