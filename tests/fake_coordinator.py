"""A coordinator without a model and without a tokenizer, whose answers are token ids."""

from __future__ import annotations

from fastserve_mega.client.testing import FakeCoordinator, answer
from fastserve_mega.messaging.messages import Welcome


def start_fake_coordinator(
    model_path: str = "/nowhere/tiny", max_context: int = 256
) -> FakeCoordinator:
    """One that answers each request with four tokens, unless told otherwise."""
    welcome = Welcome(
        epoch="epoch-0", model_name="tiny", model_path=model_path,
        max_context=max_context, vocab_size=400, eos_token_ids=(2,),
    )  # fmt: skip
    return FakeCoordinator(answer([5, 6, 7, 8]), welcome=welcome)
