"""The stages of tools/gpu_check.sh, which says what they are for."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.system.config import (
    Config,
    KvCacheConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.topology import Topology
from fastserve_mega.worker.transfer import wait_for

OUT = Path(os.environ.get("OUT", "gpu-check"))
BLOCK_SIZE = 16
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "eos_token_id": 128001,
}  # fmt: skip
TINY = {
    **LLAMA_3_8B, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512,
}  # fmt: skip
BYTES_PER_S, FLOPS = 3.0e12, 650e12
"""What an H100 reaches of its memory and of its tensor cores: the floor of a step."""


class Check:
    """The stages; a rehearsal is tiny and on the CPU."""

    def __init__(self, *, rehearsal: bool) -> None:
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self.rehearsal = rehearsal
        self.shape = TINY if rehearsal else LLAMA_3_8B
        self.context = 40 if rehearsal else 1024
        self.batches = (1, 3) if rehearsal else (1, 16, 64, 256)
        shared = Path("/dev/shm")
        self.model = (shared if shared.is_dir() else OUT) / f"gpu-check-{self.shape['hidden_size']}"

    def machine(self) -> None:
        """Versions, and what the memory and the tensor cores reach."""
        add("machine", f"torch {torch.__version__}, CUDA {torch.version.cuda}")
        size = 64 if self.rehearsal else 8192
        matrix = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        seconds = self.seconds(lambda: matrix @ matrix)
        add("product of 8192 x 8192", f"{2 * size**3 / seconds / 1e12:.0f} TFLOP/s")
        block = torch.empty(
            2**20 if self.rehearsal else 2**31, dtype=torch.uint8, device=self.device
        )
        seconds = self.seconds(block.clone)
        add("copy on the device", f"{2 * block.nbytes / seconds / 1e9:.0f} GB/s")

    def accuracy(self) -> None:
        """Attention by kernels in bfloat16, beside float64."""
        if self.rehearsal:
            return
        from fastserve_mega.worker.kernels.attention import attend
        from fastserve_mega.worker.kernels.pages import Pages, rotate_and_write
        from fastserve_mega.worker.kv_cache import KvCache
        from fastserve_mega.worker.step_batch import PackedStep

        for new, before in ((1, 4000), (300, 500)):
            cache = KvCache(
                num_blocks=300, num_layers=1, num_kv_heads=8, block_size=BLOCK_SIZE,
                head_dim=128, dtype=torch.bfloat16, device=self.device,
            )  # fmt: skip
            batch = self.sequences(1, before + new, new)
            known = torch.randn(before + new, 8, 6, 128, device=self.device).bfloat16()
            pages = Pages.of(cache)
            for part in (self.sequences(1, before, before), batch):
                step = PackedStep(part, BLOCK_SIZE).to(self.device)
                qkv = known[part[0].start : part[0].context].clone()
                rotate_and_write(qkv, pages, 0, step.slots, step.positions, turns=None, norm=None)
            got = attend(qkv, pages, 0, step, scale=0.09, window=None, softcap=None)
            wide = known.double()
            scores = torch.einsum("thgd,shd->hgts", wide[before:, :, :4], wide[:, :, 4]) * 0.09
            at = torch.arange(before + new, device=self.device)
            scores = scores.masked_fill(at > at[before:, None], -torch.inf).softmax(-1)
            expected = torch.einsum("hgts,shd->thgd", scores, wide[:, :, 5]).flatten(1)
            add(f"attention, {new} after {before}", f"off by {(got - expected).abs().max():.4f}")

    def weights(self) -> None:
        """Random weights, made on the device, and how long they take to load."""
        self.model.mkdir(parents=True, exist_ok=True)
        (self.model / "config.json").write_text(json.dumps(self.shape))
        weight_map = {}
        for number, (name, shape) in enumerate(_weights(self.shape).items()):
            file = f"{number:03}.safetensors"
            weight = torch.randn(shape, device=self.device, dtype=torch.bfloat16).mul_(0.02)
            weight = torch.ones_like(weight) if len(shape) == 1 else weight
            save_file({name: weight.cpu()}, self.model / file)
            weight_map[name] = file
        index = {"weight_map": weight_map}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index))
        begin = time.monotonic()
        self.open("torch", blocks=8).close()
        add("start with these weights", f"{time.monotonic() - begin:.1f} s")

    def decode(self, engine: str) -> None:
        """Decoding steps of several sizes; fp8 is graphs with weights in 8 bits."""
        longest = max(self.batches)
        runner = self.open(engine, blocks=1 + longest * (self.context // BLOCK_SIZE + 1))
        heads = 2 * self.shape["num_key_value_heads"] * self.shape["num_hidden_layers"]
        head_dim = self.shape["hidden_size"] // self.shape["num_attention_heads"]
        weights = [p for n, p in runner._stage.parameters().items() if "embedding" not in n]
        parameters, weight_bytes = (sum(p.numel() for p in weights), sum(p.nbytes for p in weights))
        for batch in self.batches:
            sequences = self.sequences(batch, self.context)
            step_s = self.seconds(lambda steps=sequences: runner.execute(steps))
            kv_bytes = 2 * batch * self.context * heads * head_dim
            floor_s = (weight_bytes + kv_bytes) / BYTES_PER_S
            floor_s = max(floor_s, 2 * parameters * batch / FLOPS)
            add(
                f"decode, {engine}, batch {batch}, context {self.context}",
                f"{step_s * 1e3:.2f} ms, {batch / step_s:.0f} tok/s, floor/this "
                f"{floor_s / step_s:.2f}",
            )
        runner.close()

    def swap(self) -> None:
        """Blocks out and in beside decoding steps."""
        count = 8 if self.rehearsal else 512
        batch = self.sequences(self.batches[-2], self.context)
        used = max(block for each in batch for block in each.block_table) + 1
        runner = self.open("auto", blocks=used + count, host_blocks=count + 1)
        outside = range(used, used + count)
        runner.cache.pool[used:].view(torch.uint8).random_(0, 255)
        before = runner.cache.pool[used:].clone()
        alone_s = self.seconds(lambda: runner.execute(batch))
        host, device = tuple(range(1, count + 1)), tuple(outside)
        taken, steps = [], []
        for direction, source, target in (
            (CopyDirection.SWAP_OUT, device, host), (CopyDirection.SWAP_IN, host, device),
        ):  # fmt: skip
            copy = BlockCopy(len(taken), direction, source, target, None)
            runner.copies.start([copy])
            while not (finished := runner.copies.finished()):
                steps.append(self.seconds(lambda: runner.execute(batch), 1))
            taken.append(finished[copy.copy_id])
            if direction is CopyDirection.SWAP_OUT:
                runner.cache.pool[used:].zero_()
        add("blocks after the journey", "equal" if _equal(runner, used, before) else "NOT EQUAL")
        for what, seconds in zip(("out", "in"), taken, strict=True):
            add(f"{count} blocks {what}", f"{before.nbytes / seconds / 1e9:.1f} GB/s")
        if steps:
            add("step beside a copy", f"{statistics.median(steps) / alone_s:.2f} of one alone")
        runner.close()

    def trace(self) -> None:
        """Where the time of a decoding step goes: a table in the log."""
        batch = self.sequences(self.batches[-2], self.context)
        blocks = 1 + max(block for each in batch for block in each.block_table)
        runner = self.open("torch" if self.rehearsal else "kernels", blocks=blocks)
        runner.execute(batch)
        with torch.profiler.profile() as profile:
            runner.execute(batch)
            wait_for(self.device)
        by = f"self_{self.device.type}_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=25))
        runner.close()

    def open(self, engine: str, *, blocks: int, host_blocks: int = 0) -> MegatronRunner:
        """A runner of the model."""
        quantization = "fp8" if engine == "fp8" else "none"
        engine = "graphs" if engine == "fp8" else engine
        config = Config(
            model=ModelConfig(
                path=str(self.model),
                dtype="bfloat16",
                layer_spec="local",
                quantization=quantization,
            ),
            parallel=ParallelConfig(
                device=self.device.type, cuda_engine=engine, cpu_engine="torch"
            ),
            kv_cache=KvCacheConfig(device_blocks=blocks, host_blocks=host_blocks),
            scheduler=SchedulerConfig(max_batch_size=max(self.batches)),
        )
        return MegatronRunner(config, Topology(), "", 0)

    def sequences(self, count: int, context: int, new: int = 1) -> list[SequenceInput]:
        """Requests in blocks of their own."""
        blocks = -(-context // BLOCK_SIZE)
        return [
            SequenceInput(
                request_id=RequestId(str(row)),
                token_ids=[7] * new,
                start=context - new,
                block_table=range(1 + row * blocks, 1 + (row + 1) * blocks),
                samples=True,
                params=SamplingParams(max_tokens=1, temperature=0.0),
                seed=0,
                prompt_tokens=context,
            )
            for row in range(count)
        ]

    def seconds(self, work: Callable[[], object], times: int = 15) -> float:
        """The median; the first three do not count, unless there is only one."""
        taken = []
        for _ in range(times + (3 if times > 1 else 0)):
            wait_for(self.device)
            begin = time.perf_counter()
            work()
            wait_for(self.device)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken[-times:])


def _equal(runner: MegatronRunner, used: int, before: torch.Tensor) -> bool:
    return torch.equal(
        runner.cache.pool[used:].view(torch.uint8).cpu(), before.view(torch.uint8).cpu()
    )


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


def add(what: str, found: str) -> None:
    """A row of the table."""
    print(f"{what}: {found}")
    with (OUT / "table.jsonl").open("a") as file:
        file.write(json.dumps([what, found]) + "\n")


def table(check: Check) -> None:
    """All rows, the card last."""
    rows = [json.loads(line) for line in (OUT / "table.jsonl").read_text().splitlines()]
    card = "none: a rehearsal on the CPU"
    if not check.rehearsal and torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    rows.append(["card", card])
    width = max(len(what) for what, _ in rows)
    for what, found in rows:
        print(f"{what:{width}}  {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("row", nargs="*", help="of `add`: what, and what was found")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    check = Check(rehearsal=arguments.rehearse)
    stage, _, engine = arguments.stage.partition("-")
    if stage == "add":
        add(*arguments.row)
    elif stage == "table":
        table(check)
    elif stage == "decode":
        check.decode(engine)
    elif stage in ("machine", "accuracy", "weights", "swap", "trace"):
        getattr(check, stage)()
    else:
        sys.exit(f"there is no stage {stage}")


if __name__ == "__main__":
    main()
