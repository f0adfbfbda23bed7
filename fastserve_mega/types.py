"""The vocabulary every other module shares. No third-party import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NewType

RequestId = NewType("RequestId", str)
"""Chosen by the client, unique among its unfinished requests; resubmitting it is idempotent."""

BlockHash = NewType("BlockHash", str)
"""Names the content of a full KV block: its tokens, all tokens before them, and a salt."""

MAX_SEED = 2**63 - 1


class FinishReason(str, Enum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"
    """End-of-sequence token, stop token, or (at the client) a stop string."""
    LENGTH = "length"
    """`max_tokens` tokens were generated."""
    ABORT = "abort"
    """Cancelled by its client, or the client went away."""
    TIMEOUT = "timeout"
    """Its own `timeout_s` ran out."""
    ERROR = "error"
    """The server failed; nothing was wrong with the request."""
    REJECTED = "rejected"
    """Not accepted because the server is full; try again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to end, as token-level rules.

    Stop *strings* are a matter of text and are handled where text is (`fastserve_mega.text`).
    Sampling is counter-based: the random number of a token depends on (seed, position) only.

    Raises:
        ValueError: a value is outside its range; the message names value and limit.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int | None = None
    """None lets the client (or, for a foreign client, the coordinator) choose one."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    """End-of-sequence and stop tokens are not sampled before this many output tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise ValueError(f"temperature must be between 0 and 100, got {self.temperature}")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be between 0 and {MAX_SEED}, got {self.seed}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), "
                f"got {self.min_tokens}"
            )
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must not be negative, got {self.stop_token_ids}")


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV existed when the request first ran."""
