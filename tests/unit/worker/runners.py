"""A runner of one rank on a tiny model."""

from __future__ import annotations

import contextlib

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.topology import Topology

MAX_TOKENS = 12
BLOCK_SIZE = 4
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)


@contextlib.contextmanager
def open_runner(
    directory, *, device_blocks=80, dtype="float32", device="cpu", quantization="none", **options
):
    sizes = {name: options.pop(name) for name in list(options) if name.endswith("_memory_gb")}
    sizes["dtype"] = options.pop("kv_dtype", "auto")
    config = Config(
        model=ModelConfig(path=str(directory), dtype=dtype, quantization=quantization),
        parallel=ParallelConfig(device=device, threads_per_rank=1, **options),
        kv_cache=KvCacheConfig(block_size=BLOCK_SIZE, device_blocks=device_blocks, **sizes),
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    try:
        yield runner
    finally:
        runner.close()
