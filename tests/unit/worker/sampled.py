"""A sequence, and what a model says of its next token."""

from __future__ import annotations

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.model_runner import SequenceInput

VOCABULARY = 50
SAID = (3, 7, 7, 9)


def sequence(params=None, *, seed=0, position=10, prompt_tokens=10, prompt=(), output=()):
    params = params or SamplingParams()
    return SequenceInput(
        request_id=RequestId("r"),
        token_ids=[1],
        start=position - 1,
        block_table=[1],
        samples=True,
        params=params,
        seed=seed,
        prompt_tokens=prompt_tokens,
        history=(TokenHistory(prompt_tokens, prompt, output) if params.needs_history else None),
    )
