"""Compiles the kernels that steps of Llama-3-8B start, without a GPU.

Usage: python compile_kernels.py CAPABILITY, such as 90 for an H100; below 89 without 8 bits.
Prints JSON: for each kernel its registers, bytes of its stack and of its shared memory, and the
instructions that load 16 bytes and fewer. Run in a process of its own: where kernels are
interpreted, none can be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.float8 import Float8Rows
from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.attention import attend
from fastserve_mega.worker.kernels.experts import ExpertWeights, multiply_groups
from fastserve_mega.worker.kernels.pages import HeadNorm, Pages, Turns, rotate_and_write
from fastserve_mega.worker.kernels.rows import Norm, activate, add_and_norm, scale_rows
from fastserve_mega.worker.kernels.sampling import draw
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.step_batch import PackedStep

META = torch.device("meta")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


OTHER_HEADS = (
    (64, 3, torch.float16), (80, 1, torch.bfloat16), (128, 16, torch.float32),
    (256, 2, torch.bfloat16),
)  # fmt: skip
"""Dimensions, query heads of a key-value head, and type; those of 256 with all that Gemma has."""


def started() -> dict[str, tuple[Any, Any, Any]]:
    """Title → kernel, arguments and constants, of what is started."""
    calls: dict[str, tuple[Any, Any, Any]] = {}
    title = ""

    def keep(kernel, grid, *arguments, **constants):
        calls.setdefault(f"{title}{kernel.fn.__name__}", (kernel, arguments, constants))

    launching.launch = keep
    for part, tokens, count, quantized in (
        ("decode", 1, 4, False), ("prefill", 512, 1, False), ("8 bits", 1, 4, True),
    ):  # fmt: skip
        title = part
        _attend(tokens, count, quantized)
    for part, tokens in (("decode", 1), ("prefill", 512)):
        for head_dim, group, dtype in OTHER_HEADS:
            title = f"{part} {head_dim} {TYPES[dtype]}"
            _attend(tokens, 1, False, head_dim, group, dtype)
    title = ""
    x = torch.empty((4, 4096), dtype=torch.bfloat16, device=META)
    add_and_norm(x, x, Norm(x[0], None, 1e-5, False, 0.0))
    wide = x.new_empty((4, 2 * 14336))
    activate(wide, "silu", gated=True)
    title = "scaled"
    _attend(1, 4, False, is_scaled=True)
    add_and_norm(x, x, Norm(x[0], None, 1e-5, False, 0.0, is_scaled=True))
    activate(wide, "silu", gated=True, is_scaled=True)
    scale_rows(x, Float8Rows.empty((4, 4096), x))
    experts = ExpertWeights(
        torch.empty((8, 2048, 4096), dtype=torch.float8_e4m3fn, device=META),
        torch.empty((8, 2048), device=META),
    )
    numbers = torch.empty(9, dtype=torch.int64, device=META)
    multiply_groups(x, experts, numbers, numbers[:8], chosen=2)
    title = ""
    logits = x.new_empty((4, 128256), dtype=torch.float32)
    draw(logits, logits.new_empty((5, 4), dtype=torch.float64))
    return calls


def _attend(  # noqa: PLR0917
    tokens: int, count: int, quantized: bool,
    head_dim: int = 128, group: int = 4, dtype: torch.dtype = torch.bfloat16,
    is_scaled: bool = False,
) -> None:  # fmt: skip
    cache = KvCache(
        num_blocks=64, num_layers=32, num_kv_heads=8, block_size=16, head_dim=head_dim,
        dtype=dtype, device=META, quantized=quantized,
    )  # fmt: skip
    batch = [
        SequenceInput(
            RequestId("r"), [1] * tokens, 1000, range(1, 96), True, SamplingParams(), 0, 1
        )
    ] * count
    step = PackedStep(batch, 16).to(META)
    qkv = torch.empty((tokens * count, 8, group + 2, head_dim), dtype=dtype, device=META)
    pages, turns = Pages.of(cache), Turns(torch.empty(head_dim // 2, device=META), 1.0)
    has_all = head_dim == 256
    norm = HeadNorm(qkv[0, 0, 0], qkv[0, 0, 0], 1e-6, 1.0) if has_all else None
    rotate_and_write(qkv, pages, 3, step.slots, step.positions, turns=turns, norm=norm)
    window, softcap = (512, 30.0) if has_all else (None, None)
    options = {"window": window, "softcap": softcap, "is_scaled": is_scaled}
    attend(qkv, pages, 3, step, scale=0.1, **options)


def compiled(
    capability: int, kernel: Any, arguments: Any, constants: dict[str, Any]
) -> dict[str, int]:
    """Compile as Triton does when it is started with these arguments."""
    options = {name: constants.pop(name) for name in ("num_warps",) if name in constants}
    names = kernel.arg_names
    signature, attributes, known = {}, {}, dict(constants)
    for index, (name, value) in enumerate(zip(names, arguments, strict=False)):
        is_general = kernel.params[index].do_not_specialize
        is_anywhere = kernel.params[index].do_not_specialize_on_alignment
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not is_general:
            known[name] = 1
            continue
        else:
            signature[name] = "i32"
        is_multiple = isinstance(value, int) and value % 16 == 0 and not is_general
        if (isinstance(value, torch.Tensor) and not is_anywhere) or is_multiple:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(known, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in names},
        constexprs=known,
        attrs=attributes,
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        told = [
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        ]
    loads = re.findall(r"\b(LDG|LDGSTS)\.E(\S*)", told[1])
    return {
        "registers": int(re.search(r"REG:(\d+)", told[0])[1]),
        "stack": int(re.search(r"STACK:(\d+)", told[0])[1]),
        "shared": binary.metadata.shared,
        "wide_loads": sum(".128" in kind for _, kind in loads),
        "loads": len(loads),
    }


def main() -> None:
    capability = int(sys.argv[1])
    made = {
        title: compiled(capability, *call)
        for title, call in started().items()
        if capability >= 89 or not title.startswith(("8 bits", "scaled"))
    }
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    main()
