"""Small random models of every family, as Hugging Face directories."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
import transformers

SMOLLM2 = (
    Path(os.environ.get("FASTSERVE_MEGA_CACHE") or "~/.cache/fastserve_mega").expanduser()
    / "smollm2-135m-instruct"
)
"""A real model, made by tools/fetch_smollm2.py; not always there."""

LAYERS = 3

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,  # odd, so that two tensor ranks need padding
    "max_position_embeddings": 128,
    # Larger than usual: the best two logits of a random model must not be equal by rounding.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_QWEN_MOE = {
    **_LLAMA,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}

MODELS = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama-scaled": (
        "LlamaConfig",
        {**_LLAMA, "rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-one-kv-head": (
        "LlamaConfig",
        {**_LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 9, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}),
    "qwen3-yarn": ("Qwen3Config", {**_LLAMA, "head_dim": 16, "rope_parameters": _YARN_ROPE}),
    "mixtral": (
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**_QWEN_MOE, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**_QWEN_MOE, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "smollm3": ("SmolLM3Config", {**_LLAMA, "pad_token_id": 0, "no_rope_layer_interval": 2}),
    "gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2Config",
        {
            **_LLAMA,
            "head_dim": 16,
            # With tied embeddings a small model repeats the last token, whatever it attends to.
            "tie_word_embeddings": False,
            "query_pre_attn_scalar": 4,
            "sliding_window": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_LLAMA,
            "head_dim": 16,
            "query_pre_attn_scalar": 4,
            "sliding_window": 9,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", {**_LLAMA, "pad_token_id": 0, "sliding_window": 9}),
    "phi4-mini": (
        "Phi3Config",
        {
            **_LLAMA,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            # All contexts are long: transformers takes other angles for those that are not.
            "original_max_position_embeddings": 1,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.0, 1.0],
                "long_factor": [1.1, 1.7, 3.0],
                "attention_factor": 1.2,
            },
        },
    ),
    "olmo2": ("Olmo2Config", {**_LLAMA, "pad_token_id": 0}),
    "olmo3": (
        "Olmo3Config",
        {
            **_LLAMA,
            "pad_token_id": 0,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": _YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            **_LLAMA,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.4,
            "logits_scaling": 4.0,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "vocab_size": 131,
            "max_position_embeddings": 128,
            "init_std": 0.3,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": LAYERS,
            "n_head": 4,
            "vocab_size": 131,
            "n_positions": 128,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe")
"""Those with experts."""


def make_model(name: str, directory: Path) -> torch.nn.Module:
    """Write a model with fixed random weights (biases and norms included) and return it."""
    kind, settings = MODELS[name]
    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, kind)(**settings)
    torch.manual_seed(sum(map(ord, name)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif "norm" in key or ".ln_" in key:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(directory)
    return model


def greedy(model: torch.nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    """Reference: the whole sequence anew for each token, no cache at all."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def last_hidden_state(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """Of the last token, behind the final norm and scaled to length 1."""
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1], dim=0)


def greedy_after_each(model: torch.nn.Module, prompt: list[int], output: list[int]) -> list[int]:
    """The greedy token after each prefix of an output: the output itself if that is greedy.

    One pass over the sequence, where `greedy` takes one for each token.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output[:-1]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 :].argmax(dim=-1).tolist()


def prompts() -> list[list[int]]:
    """Of lengths below, at and above the sizes of chunk, block and window."""
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 33, 1, 16, 8, 50)
    return [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]
