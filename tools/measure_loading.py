"""Measures the memory that ranks need to load a model: makes a random Llama and loads it.

    python tools/measure_loading.py                      # 1 GB in bfloat16 at TP=2
    python tools/measure_loading.py --dtype float32 --gigabytes 0.1 --tensor 1
    python tools/measure_loading.py --format torch_dist  # the same from Megatron's format

For each rank, in MB of 10^6 bytes, from /proc/self/status: its resident set once Python, torch and
Megatron are imported (`base`); the highest one while it loads (`peak`, VmHWM); afterwards the
process's own memory (`anonymous`) and pages of files such as libtorch (`file`, which the ranks of a
machine share); what the weights added at the most (`growth`, peak less base).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_RANK = "--rank-of"
_HIDDEN = 1024
_FFN = 4096
_VOCAB, _SMALL_VOCAB = 32000, 4000
_SMALL_BYTES = 500_000_000
_TIMEOUT_S = 500


def write_random_llama(directory: Path, num_bytes: int, dtype_name: str) -> None:
    """About as large as asked for, in shards of at most a quarter; one layer at a time."""
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)

    layer_elements = 4 * _HIDDEN**2 + 3 * _HIDDEN * _FFN + 2 * _HIDDEN
    vocab = _VOCAB if num_bytes > _SMALL_BYTES else _SMALL_VOCAB
    fixed = 2 * vocab * _HIDDEN + _HIDDEN
    layers = max(2, (num_bytes // dtype.itemsize - fixed) // layer_elements)
    per_shard = max(1, layers // 4)
    index: dict[str, str] = {}
    ends = {
        "model.embed_tokens.weight": (vocab, _HIDDEN),
        "lm_head.weight": (vocab, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
    }

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for first in range(0, layers, per_shard):
        tensors = {}
        for layer in range(first, min(first + per_shard, layers)):
            prefix = f"model.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                tensors[f"{prefix}.self_attn.{name}.weight"] = random(_HIDDEN, _HIDDEN)
            for name in ("gate_proj", "up_proj"):
                tensors[f"{prefix}.mlp.{name}.weight"] = random(_FFN, _HIDDEN)
            tensors[f"{prefix}.mlp.down_proj.weight"] = random(_HIDDEN, _FFN)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = torch.ones(_HIDDEN, dtype=dtype)
        write(f"model-{first}.safetensors", tensors)
    write("model-ends.safetensors", {name: random(*shape) for name, shape in ends.items()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "vocab_size": vocab,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))


def memory_mb() -> dict[str, float]:
    """Of this process, by the names of /proc/self/status."""
    words = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {w[0][:-1]: int(w[1]) / 1e3 * 1.024 for w in words if len(w) == 3 and w[2] == "kB"}


def be_a_rank(directory: Path, dtype: str, tensor: int, results: Path) -> None:
    """Load as a worker does, and write what it took."""
    from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
    from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
    from fastserve_mega.worker.network import choose_master
    from fastserve_mega.worker.rank_group import RankGroup
    from fastserve_mega.worker.rendezvous import make_exchange
    from fastserve_mega.worker.topology import read_topology

    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastserve_mega").setLevel(logging.INFO)  # says how fast rank 0 loads
    topology = read_topology()
    ranks = RankGroup(topology, make_exchange(topology, _TIMEOUT_S), _TIMEOUT_S)
    config = Config(
        model=ModelConfig(path=str(directory), dtype=dtype),  # type: ignore[arg-type]
        parallel=ParallelConfig(tensor=tensor, device="cpu", threads_per_rank=1),
        kv_cache=KvCacheConfig(device_blocks=2, host_blocks=0),
    )
    ranks.agree(config)
    own = choose_master(ranks.topology, port_is_free=True) if topology.rank == 0 else ""
    host, _, port = ranks.broadcast(own).rpartition(":")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts anew
    base = memory_mb()
    runner = MegatronRunner(config, topology, host, int(port))
    after = memory_mb()
    runner.close()
    found = {
        "base": base["VmRSS"],
        "peak": after["VmHWM"],
        "growth": after["VmHWM"] - base["VmRSS"],
        "anonymous": after["RssAnon"],
        "file": after["RssFile"],
    }
    (results / f"{topology.rank}.json").write_text(json.dumps(found))


def measure(directory: Path, dtype: str, tensor: int) -> list[dict[str, float]]:
    """What each rank wrote."""
    mpirun = Path(sys.executable).parent / "mpirun"
    command = [str(mpirun) if mpirun.exists() else "mpirun", "--oversubscribe", "--bind-to", "none"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    command += ["-n", str(tensor), sys.executable, __file__, _RANK, str(directory)]
    with tempfile.TemporaryDirectory() as results:
        command += ["--dtype", dtype, "--tensor", str(tensor), "--results", results]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, timeout=_TIMEOUT_S, env=environment)
        files = [Path(results) / f"{rank}.json" for rank in range(tensor)]
        return [json.loads(file.read_text()) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights, 10^9 bytes each")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--load-dtype", default=None, help="default: the same")
    parser.add_argument("--tensor", type=int, default=2, help="ranks, each with an equal share")
    parser.add_argument(
        "--format",
        default="huggingface",
        choices=("huggingface", "torch_dist"),
        help="of the files",
    )
    parser.add_argument("--model", type=Path, help="measure this directory instead")
    parser.add_argument(_RANK, type=Path, dest="rank_of", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_a_rank(options.rank_of, options.dtype, options.tensor, options.results)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.model or Path(temporary) / "huggingface"
        if not options.model:
            directory.mkdir()
            write_random_llama(directory, int(options.gigabytes * 1e9), options.dtype)
            if options.format == "torch_dist":
                directory = convert_in_a_process(directory, Path(temporary) / "megatron")
        files = [*directory.glob("*.safetensors"), *directory.glob("*.distcp")]
        size = sum(file.stat().st_size for file in files) / 1e6
        ranks = measure(directory, options.load_dtype or options.dtype, options.tensor)
    print(f"{size:.0f} MB of weights over {options.tensor} ranks")
    for rank, found in enumerate(ranks):
        print(f"rank {rank}:", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))


def convert_in_a_process(source: Path, target: Path) -> Path:
    """So that this one stays small."""
    command = [sys.executable, "-m", "fastserve_mega", "convert", "--from", str(source)]
    command += ["--to", str(target), "--format", "torch_dist"]
    subprocess.run(command, check=True, timeout=_TIMEOUT_S)
    return target


if __name__ == "__main__":
    main()
