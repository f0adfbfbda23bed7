"""Where a checkpoint keeps each weight: the names of a Hugging Face state dict."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names of the modules of a mixture of experts; those of one expert contain `{expert}`."""

    router: str
    gate: str
    up: str
    down: str
    fused: str
    """Module of the whole mixture where all experts are in two tensors, as transformers 5 has them
    in memory: `.experts.gate_up_proj` [experts, gate and up rows, hidden],
    `.experts.down_proj` [experts, hidden, ffn]. Its router is `.gate`."""
    shared_gate: str | None = None
    shared_up: str | None = None
    shared_down: str | None = None
    shared_router: str | None = None
    """One row: its sigmoid weighs the shared expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Names of modules; `.weight` and `.bias` are appended to them.

    Names of one layer contain `{layer}`. All start with `prefix`, which checkpoints saved from
    the bare model leave out.
    """

    prefix: str
    embedding: str
    final_norm: str
    attention_output: str
    down: str
    input_norm: str | None = None
    feed_forward_norm: str | None = None
    up: str | None = None
    head: str = "lm_head"
    """Output layer, without the prefix; absent from the file when embeddings are tied."""
    position_embedding: str | None = None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused_qkv: str | None = None
    """Query, key and value rows of all heads in one weight, instead of the three above."""
    gate: str | None = None
    fused_gate_up: str | None = None
    """Rows of the gate, then as many of `up`, in one weight, instead of the two."""
    query_norm: str | None = None
    key_norm: str | None = None
    post_attention_norm: str | None = None
    """Norm of what attention adds to the residual; likewise the next."""
    post_feed_forward_norm: str | None = None
    experts: ExpertNames | None = None
    transposed: bool = False
    """Linear weights of the layers are stored as [input, output]."""
