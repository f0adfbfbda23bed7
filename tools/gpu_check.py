"""The stages of tools/gpu_check.sh, which says what they are for."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_http import time_per_token
from gpu_table import OUT, add
from random_llama import LLAMA_3_8B, TINY, RandomWeights, find_room, write_description, write_files

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.system.config import (
    Config,
    KvCacheConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.megatron import megatron_runner
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.topology import Topology
from fastserve_mega.worker.transfer import wait_for

BLOCK_SIZE = 16
BYTES_PER_S, FLOPS = 3.0e12, 650e12
"""What an H100 reaches of its memory and of its tensor cores: the floor of a step."""
HTTP_USERS = 64


class Check:
    """The stages; a rehearsal is tiny and on the CPU."""

    def __init__(self, *, rehearsal: bool) -> None:
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self.rehearsal = rehearsal
        self.shape = TINY if rehearsal else LLAMA_3_8B
        self.context = 40 if rehearsal else 1024
        self.batches = (1, 3) if rehearsal else (16, 64, 256, 1)
        self.most = 3 if rehearsal else 64
        """Requests beside which blocks are copied, and of which a trace is made."""
        self.files = find_room(self.shape, OUT) / f"gpu-check-{self.shape['hidden_size']}"

    def machine(self) -> None:
        """Versions, and what the memory and the tensor cores reach."""
        add("machine", f"torch {torch.__version__}, CUDA {torch.version.cuda}")
        add("product of 8192 x 8192", f"{self.product_flops() / 1e12:.0f} TFLOP/s")
        block = torch.empty(
            2**20 if self.rehearsal else 2**31, dtype=torch.uint8, device=self.device
        )
        seconds = self.seconds(block.clone)
        add("copy on the device", f"{2 * block.nbytes / seconds / 1e9:.0f} GB/s")

    def product_flops(self) -> float:
        """What a large matrix product reaches, FLOP/s."""
        size = 64 if self.rehearsal else 8192
        matrix = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size**3 / self.seconds(lambda: matrix @ matrix)

    def tokens(self) -> None:
        """Whether all engines give the same tokens in float32, from random weights."""
        engines = ("torch", "auto") if self.rehearsal else ("torch", "kernels", "graphs")
        self.shape = {**TINY, "hidden_size": 256}
        found = {}
        for engine in engines:
            with self.opened(engine, blocks=64, dtype="float32") as runner:
                found[engine] = [self.generated(runner, first) for first in (3, 5, 7)]
        same = all(tokens == found["torch"] for tokens in found.values())
        add("tokens of all engines are equal", ", ".join(engines), float(same))

    def generated(self, runner: MegatronRunner, first: int) -> list[int]:
        """A prompt of 20 tokens, and greedily 12 more."""
        known, start = [(first * step) % 500 for step in range(1, 21)], 0
        for _ in range(12):
            step = self.sequences(1, len(known), len(known) - start)
            object.__setattr__(step[0], "token_ids", known[start:])
            start = len(known)
            known += runner.execute(step).token_ids
        return known[20:]

    def accuracy(self) -> None:
        """Attention by kernels in bfloat16, beside float64."""
        if self.rehearsal:
            return
        from gpu_accuracy import attention_error  # needs Triton

        for new, before in ((1, 4000), (300, 500)):
            steps = self.sequences(1, before, before), self.sequences(1, before + new, new)
            error = attention_error(self.device, steps, BLOCK_SIZE)
            add(f"attention, {new} after {before}", "largest error", error)

    def decode(self, engine: str) -> None:
        """Decoding steps of several sizes.

        fp8 is graphs with weights in 8 bits, ahead is graphs with look-ahead.
        """
        blocks = 1 + max(self.batches) * (self.context // BLOCK_SIZE + 1)
        with self.opened(engine, blocks=blocks) as runner:
            for batch in self.batches:
                sequences = self.sequences(batch, self.context)
                if engine == "ahead":
                    step_s = self.step_ahead_s(runner, sequences)
                else:
                    step_s = self.seconds(lambda steps=sequences: runner.execute(steps))
                share = self.floor_s(runner, batch) / step_s
                told = f"of the floor, {step_s * 1e3:.2f} ms, {batch / step_s:.0f} tok/s"
                add(f"decode, {engine}, batch {batch}", told, share)

    def step_ahead_s(self, runner: MegatronRunner, sequences: list[SequenceInput]) -> float:
        """Of a row of steps, each launched before the last one's tokens are here."""
        if self.rehearsal:
            return self.seconds(lambda: runner.execute(sequences))
        following = [replace(each, token_ids=(-1 - row,)) for row, each in enumerate(sequences)]
        pending = runner.launch(sequences)

        def step() -> None:
            nonlocal pending
            last, pending = pending, runner.launch(following)
            last()

        return self.seconds(lambda: [step() for _ in range(30)], 3) / 30

    def floor_s(self, runner: MegatronRunner, batch: int) -> float:
        """The least that a decoding step can take."""
        weights = [p for n, p in runner._stage.parameters().items() if "embedding" not in n]
        heads = 2 * self.shape["num_key_value_heads"] * self.shape["num_hidden_layers"]
        head_dim = self.shape["hidden_size"] // self.shape["num_attention_heads"]
        num_bytes = sum(p.nbytes for p in weights) + 2 * batch * self.context * heads * head_dim
        flops = 2 * sum(p.numel() for p in weights) * batch
        return max(num_bytes / BYTES_PER_S, flops / FLOPS)

    def prefill(self) -> None:
        """A chunk of a prompt, and what a large product reaches on the same device."""
        tokens = 32 if self.rehearsal else 4096
        flops = self.product_flops()
        with self.opened("auto", blocks=2 + tokens // BLOCK_SIZE) as runner:
            batch = self.sequences(1, tokens, tokens)
            step_s = self.seconds(lambda: runner.execute(batch), 5)
            named = runner._stage.parameters().items()
            weights = sum(p.numel() for n, p in named if not ("embedding" in n or "output" in n))
        attended = 2 * self.shape["num_hidden_layers"] * self.shape["hidden_size"] * tokens**2
        done = (2 * weights * tokens + attended) / step_s
        told = f"of a product, {tokens / step_s:.0f} tok/s, {done / 1e12:.0f} TFLOP/s"
        add("prefill", told, done / flops)

    def swap(self) -> None:
        """Blocks out and in beside decoding steps."""
        count = 8 if self.rehearsal else 1024
        batch = self.sequences(self.most, self.context)
        used = max(block for each in batch for block in each.block_table) + 1
        with self.opened("auto", blocks=used + count, host_blocks=count + 1) as runner:
            runner.cache.pool[used:].view(torch.uint8).random_(0, 255)
            before = runner.cache.pool[used:].clone()
            alone_s = self.seconds(lambda: runner.execute(batch))
            host, device = tuple(range(1, count + 1)), tuple(range(used, used + count))
            steps = []
            for number, (direction, source, target) in enumerate((
                (CopyDirection.SWAP_OUT, device, host), (CopyDirection.SWAP_IN, host, device),
            )):  # fmt: skip
                runner.copies.start([BlockCopy(number, direction, source, target, None)])
                while not (finished := runner.copies.finished()):
                    steps.append(self.seconds(lambda: runner.execute(batch), 1))
                if direction is CopyDirection.SWAP_OUT:
                    runner.cache.pool[used:].zero_()
                reached = before.nbytes / finished[number] / 1e9
                add(direction.name.lower(), f"GB/s, {count} blocks", reached)
            after = runner.cache.pool[used:].view(torch.uint8).cpu()
            same = torch.equal(after, before.view(torch.uint8).cpu())
            add("blocks are equal after the journey", "", float(same))
            if steps:
                longer = statistics.median(steps) / alone_s
                add("step beside a copy", "times one alone", longer)

    def trace(self) -> None:
        """Where the time of a decoding step goes: a table in the log."""
        batch = self.sequences(self.most, self.context)
        blocks = 1 + max(block for each in batch for block in each.block_table)
        engine = "torch" if self.rehearsal else "kernels"
        with self.opened(engine, blocks=blocks) as runner:
            runner.execute(batch)
            with torch.profiler.profile() as profile:
                runner.execute(batch)
                wait_for(self.device)
        by = f"self_{self.device.type}_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=25))

    def load(self) -> None:
        """Weights in files, and how long a rank takes to start with them."""
        write_files(self.files, self.shape, self.device)
        begin = time.monotonic()
        MegatronRunner(self.config("torch", blocks=8, path=self.files), Topology(), "", 0).close()
        add("start with weights in files", "s", time.monotonic() - begin)

    def http(self) -> None:
        """Tokens of each user a second over HTTP, beside those of steps in a process."""
        users = 2 if self.rehearsal else HTTP_USERS
        context, output = (16, 8) if self.rehearsal else (256, 128)
        blocks = 1 + 2 * users * ((context + output) // BLOCK_SIZE + 1)
        with self.opened("auto", blocks=blocks) as runner:
            batch = self.sequences(users, context + output // 2)
            step_s = self.seconds(lambda: runner.execute(batch))
        settings = (
            f"parallel.device={self.device.type}", f"kv_cache.device_blocks={blocks}",
            "kv_cache.swap.strategy=none", "model.dtype=bfloat16",
            f"scheduler.max_batch_size={users}",
        )  # fmt: skip
        if not self.files.exists():
            write_files(self.files, self.shape, self.device)
        http_s = time_per_token(
            self.files, settings, OUT / "http.json", users=users, prompt=context, output=output
        )
        told = f"{1e3 * step_s:.2f} ms in a process, {1e3 * http_s:.2f} over HTTP"
        add("users over HTTP", told, step_s / http_s)

    @contextmanager
    def opened(self, engine: str, **options: Any) -> Iterator[MegatronRunner]:
        """A runner of the model with weights that are made where they are used."""
        path = OUT / f"model-{self.shape['hidden_size']}"
        write_description(path, self.shape)
        megatron_runner.open_checkpoint = lambda *_: RandomWeights()
        runner = MegatronRunner(self.config(engine, path=path, **options), Topology(), "", 0)
        try:
            yield runner
        finally:
            runner.close()

    def config(
        self, engine: str, *, path: Path, blocks: int, host_blocks: int = 0, dtype: str = "bfloat16"
    ) -> Config:
        """Of one rank."""
        is_float8, is_recorded = engine == "fp8", engine in ("fp8", "ahead")
        return Config(
            model=ModelConfig(
                path=str(path), dtype=dtype, layer_spec="local",
                quantization="fp8" if is_float8 else "none",
            ),
            parallel=ParallelConfig(
                device=self.device.type, cuda_engine="graphs" if is_recorded else engine,
                cpu_engine="auto" if engine == "auto" else "torch",
            ),
            kv_cache=KvCacheConfig(device_blocks=blocks, host_blocks=host_blocks),
            scheduler=SchedulerConfig(max_batch_size=max(self.batches)),
        )  # fmt: skip

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    check = Check(rehearsal=arguments.rehearse)
    stage, _, engine = arguments.stage.partition("-")
    if stage == "decode":
        check.decode(engine)
    elif stage in ("machine", "tokens", "accuracy", "prefill", "swap", "trace", "load", "http"):
        getattr(check, stage)()
    else:
        sys.exit(f"there is no stage {stage}")


if __name__ == "__main__":
    main()
