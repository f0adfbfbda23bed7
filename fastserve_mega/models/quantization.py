"""Which quantized checkpoints can be read, from `quantization_config` in config.json.

Their weights have 8 bits (e4m3) and scales beside them, in tensors named after them. Which weights
these are, and whether a scale is for a tensor, an output or a block, the files themselves say.
"""

from __future__ import annotations

from typing import Any

_SUPPORTED = (
    "supported are fp8, fbgemm_fp8, and compressed-tensors with weights that are floats of 8 bits"
)


def read_weight_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Outputs and inputs of a block with a scale of its own, None where no block is named.

    Args:
        config: config.json.

    Raises:
        ValueError: the checkpoint is quantized in another way, or the sizes are malformed.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method in ("fp8", "fbgemm_fp8"):
        if settings.get("fmt", "e4m3") != "e4m3":
            raise ValueError(f"quantization_config.fmt is {settings['fmt']!r}; supported is e4m3")
        return _block(settings.get("weight_block_size"))
    if method == "compressed-tensors":
        return _compressed_block(settings)
    raise ValueError(f"quantization_config.quant_method is {method!r}; {_SUPPORTED}")


def _compressed_block(settings: dict[str, Any]) -> tuple[int, int] | None:
    groups = settings.get("config_groups")
    blocks: set[tuple[int, int] | None] = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        kind = (weights.get("type"), weights.get("num_bits"))
        if kind != ("float", 8) or weights.get("symmetric") is False:
            raise ValueError(
                f"quantization_config has weights of type {kind[0]!r} with {kind[1]!r} bits; "
                f"{_SUPPORTED}"
            )
        blocks.add(_block(weights.get("block_structure")))
    if len(blocks) > 1:
        raise ValueError("quantization_config has weights with blocks of several sizes")
    return blocks.pop() if blocks else None


def _block(sizes: Any) -> tuple[int, int] | None:
    """[outputs, inputs]; older compressed-tensors write "128x128"."""
    if isinstance(sizes, str):
        sizes = [int(size) if size.isdecimal() else size for size in sizes.split("x")]
    if sizes is None:
        return None
    if not (
        isinstance(sizes, list) and len(sizes) == 2 and all(type(s) is int and s > 0 for s in sizes)
    ):
        raise ValueError(f"quantization_config: a block must have two sizes, got {sizes!r}")
    return sizes[0], sizes[1]
