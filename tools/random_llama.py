"""A Llama with random weights: made on the device where nothing but its speed is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastserve_mega.worker.megatron.model import Stage

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "eos_token_id": 128001,
}  # fmt: skip
TINY = {
    **LLAMA_3_8B, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512, "eos_token_id": 511,
}  # fmt: skip
_SPREAD = 0.02


class RandomWeights:
    """In the place of a checkpoint."""

    def load(self, stage: Stage, report: Callable[[int], None]) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for name, parameter in sorted(stage.parameters().items()):
            target = parameter.detach()
            generator = generators.setdefault(target.device, torch.Generator(target.device))
            if name.endswith("_scale"):
                target.fill_(_SPREAD)
            elif target.dim() == 1:
                target.fill_(1.0)
            elif target.dtype == torch.float8_e4m3fn:
                target.copy_(torch.randn(target.shape, device=target.device, generator=generator))
            else:
                target.normal_(0.0, _SPREAD, generator=generator)
            report(parameter.nbytes)


def write_description(directory: Path, shape: dict) -> None:
    """What a runner reads besides weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape))


def write_files(directory: Path, shape: dict, device: torch.device) -> None:
    """A whole model, in bfloat16, with a tokenizer that has a word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_description(directory, shape)
    weight_map = {}
    for number, (name, size) in enumerate(_weights(shape).items()):
        file = f"{number:03}.safetensors"
        weight = torch.randn(size, device=device, dtype=torch.bfloat16).mul_(_SPREAD)
        weight = torch.ones_like(weight) if len(size) == 1 else weight
        save_file({name: weight.cpu()}, directory / file)
        weight_map[name] = file
    index = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"t{token}": token for token in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))


def find_room(shape: dict, *others: Path) -> Path:
    """The first of some directories that has room for the files: memory is read fastest."""
    sizes = (torch.Size(size).numel() for size in _weights(shape).values())
    needed = 2 * sum(sizes) * 5 // 4
    for directory in (Path("/dev/shm"), *others):
        if directory.is_dir() and shutil.disk_usage(directory).free > needed:
            return directory
    raise SystemExit(f"no directory has {needed / 1e9:.1f} GB left")


def _weights(shape: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    weights: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocab_size"], hidden),
        "lm_head.weight": (shape["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    of_layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for layer in range(shape["num_hidden_layers"]):
        for name, size in of_layer.items():
            weights[f"model.layers.{layer}.{name}.weight"] = size
    return weights
