"""One rank under mpirun: runs every job of a scenario file, rank 0 writes the results.

Usage: python rank.py SCENARIO.json RESULTS.json
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from generation import embed, generate
from mpi4py import MPI

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.megatron.distributed_saving import save_stage
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.topology import read_topology

WORLD = MPI.COMM_WORLD


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_job(job: dict) -> list[list[int]] | None:
    parallel = ParallelConfig(
        tensor=job["tensor"],
        pipeline=job["pipeline"],
        expert=job.get("expert", 1),
        layers_per_stage=tuple(job["layers_per_stage"]) if job.get("layers_per_stage") else None,
        device="cpu",
        # Weights that were laid out for the native step cannot be saved.
        cpu_engine="torch" if job.get("save_to") else "auto",
        threads_per_rank=1,
        timeout_s=120,
    )
    config = Config(
        model=ModelConfig(path=job["model"], dtype="float32"),
        parallel=parallel,
        kv_cache=KvCacheConfig(block_size=job["block_size"], device_blocks=job["device_blocks"]),
    )
    port = WORLD.bcast(free_port())
    runner = MegatronRunner(config, read_topology(), "127.0.0.1", port)
    if job.get("save_to"):
        save_stage(Path(job["save_to"]), runner._stage, runner.architecture, runner._partition)
    sampling_rank = parallel.world_size - parallel.tensor
    assert runner.is_sampling_rank == (WORLD.rank == sampling_rank)

    def share_tokens(tokens: list[int]) -> list[int]:
        return WORLD.bcast(tokens, root=sampling_rank)

    if job.get("embeds"):
        options = {"block_size": job["block_size"], "chunk": job["chunk"], "share": share_tokens}
        embeddings = embed(runner, job["prompts"], **options)
        runner.close()
        return embeddings
    params = SamplingParams(max_tokens=job["max_tokens"], temperature=0.0)
    outputs = generate(
        runner,
        job["prompts"],
        params,
        block_size=job["block_size"],
        chunk=job["chunk"],
        concurrent=job.get("concurrent", 4),
        share_tokens=share_tokens,
    )
    runner.close()
    return outputs


def main() -> None:
    scenario, results = map(Path, sys.argv[1:])
    outputs = {name: run_job(job) for name, job in json.loads(scenario.read_text()).items()}
    if WORLD.rank == 0:
        results.write_text(json.dumps(outputs))


if __name__ == "__main__":
    main()
