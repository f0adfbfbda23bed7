"""Generates with the stand-ins of this directory in place of what needs a GPU.

Usage: python run_layers.py < jobs.json > results.json
Each job has a model directory, a layer_spec and prompts; its result has the names of the classes
of the layers, the calls of the fused norm, and the tokens.
"""

from __future__ import annotations

import json
import sys

import torch
from generation import generate

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.megatron import layer_spec
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.topology import Topology


def run(job: dict) -> dict:
    import apex.normalization.fused_layer_norm as apex_norm

    apex_norm.calls.clear()
    config = Config(
        model=ModelConfig(path=job["model"], dtype="float32", layer_spec=job["layer_spec"]),
        parallel=ParallelConfig(device="cpu", threads_per_rank=1, cpu_engine="torch"),
        kv_cache=KvCacheConfig(block_size=4, device_blocks=80),
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    classes = {type(module).__name__ for module in runner._stage.model.modules()}
    params = SamplingParams(max_tokens=job["max_tokens"], temperature=0.0)
    tokens = generate(runner, job["prompts"], params, block_size=4, chunk=7)
    runner.close()
    return {"classes": sorted(classes), "fused_norms": len(apex_norm.calls), "tokens": tokens}


def main() -> None:
    layer_spec._is_gpu = lambda device: True
    torch.cuda.current_device = lambda: torch.device("cpu")
    json.dump({name: run(job) for name, job in json.load(sys.stdin).items()}, sys.stdout)


if __name__ == "__main__":
    main()
