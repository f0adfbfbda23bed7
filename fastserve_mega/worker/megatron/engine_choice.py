"""Chooses between torch and the native step, alike on all ranks."""

from __future__ import annotations

import functools
import importlib.util
import logging
import time

import torch
import torch.distributed as dist

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.config import Config, ModelConfig, ParallelConfig
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.float8 import FIRST_FLOAT8_CAPABILITY
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.megatron.engine import StageEngine, TakesDrawn, TorchEngine
from fastserve_mega.worker.megatron.layers import ColumnLinear
from fastserve_mega.worker.megatron.model import Stage
from fastserve_mega.worker.megatron.native_engine import NativeEngine
from fastserve_mega.worker.native.library import NativeError, load_library
from fastserve_mega.worker.sampler import Draw

_MAX_HEAD_DIM = 512
_MAX_KERNEL_HEAD_DIM = 256
_FIRST_KERNEL_CAPABILITY = (8, 0)
"""Triton multiplies in bfloat16 for CUDA devices from this one on: Ampere."""
_LONGEST_REASON = 200
_READ_AHEAD_BYTES = 64
"""The kernels read that much behind the keys of a head."""

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


def open_engine(
    config: Config,
    stage: Stage,
    architecture: Architecture,
    partition: Partition,
    cache: KvCache,
    *,
    is_trial: bool = False,
) -> StageEngine:
    """Open what computes the steps of a stage whose weights are loaded.

    All ranks call it together: what stages hand over to each other depends on it. On CUDA a trial
    is opened in silence, and records no graphs.

    Raises:
        ValueError: parallel.cpu_engine=native, model.quantization=int8 or parallel.cuda_engine ask
            for what cannot be used.
    """
    parallel, has_byte_weights = config.parallel, config.model.quantization == "int8"
    if cache.pool.device.type == "cuda":
        if has_byte_weights:
            raise ValueError("model.quantization=int8 is for CPUs, but the device is cuda")
        return _open_on_cuda(config, stage, architecture, partition, cache, is_trial=is_trial)
    obstacle: str | None = "torch was asked for (parallel.cpu_engine)"
    if parallel.cpu_engine != "torch":
        obstacle = _agreed(_obstacle(config.model, architecture, partition, cache))
        if obstacle and parallel.cpu_engine == "native":
            raise ValueError(f"parallel.cpu_engine=native, but {obstacle}")
    if obstacle and has_byte_weights:
        raise ValueError(f"model.quantization=int8 needs the native step, but {obstacle}")
    is_first = partition.is_first_stage and partition.tensor_rank == 0
    if obstacle:
        if is_first:
            _log.info("steps on the CPU: torch (%s)", obstacle)
        return TorchEngine(stage, architecture, partition, cache)
    engine = NativeEngine(
        load_library(), stage, architecture, partition, cache, has_byte_weights=has_byte_weights
    )
    if is_first:
        weights = "8-bit weights, " if has_byte_weights else ""
        told = f"{engine.title}, {weights}{engine.threads} threads a rank"
        _log.info("steps on the CPU: native (%s)", told)
    return engine


def choose_draw(parallel: ParallelConfig, device: torch.device) -> Draw | None:
    """What draws tokens on the device; None where torch has to."""
    if device.type != "cuda" or parallel.cuda_engine == "torch" or _triton_obstacle(device):
        return None
    from fastserve_mega.worker.kernels.sampling import draw

    return draw


def records_graphs(parallel: ParallelConfig, engine: StageEngine) -> bool:
    """Whether decoding steps of an engine on CUDA are recorded."""
    return isinstance(engine, TakesDrawn) and parallel.cuda_engine != "kernels"


def _open_on_cuda(
    config: Config,
    stage: Stage,
    architecture: Architecture,
    partition: Partition,
    cache: KvCache,
    *,
    is_trial: bool,
) -> StageEngine:
    wanted = config.parallel.cuda_engine
    obstacle = "parallel.cuda_engine=torch"
    if wanted != "torch":
        own = _kernel_obstacle(stage, architecture, cache)
        obstacle = _agreed(own, stage.groups.tensor, cache.pool.device) or ""
        if obstacle and wanted != "auto":
            raise ValueError(f"parallel.cuda_engine={wanted}, but {obstacle}")
    is_first = partition.is_first_stage and partition.tensor_rank == 0 and not is_trial
    if obstacle:
        if is_first:
            _log.info("steps on the GPU: torch (%s)", obstacle)
        return TorchEngine(stage, architecture, partition, cache)
    from fastserve_mega.worker.megatron.decode_graphs import CudaRecorder
    from fastserve_mega.worker.megatron.kernel_engine import KernelEngine

    engine = KernelEngine(stage, architecture, partition, cache)
    has_graphs = records_graphs(config.parallel, engine)
    if is_first:
        told = "recording graphs of decoding steps" if has_graphs else "cuda_engine=kernels"
        _log.info("steps on the GPU: kernels (%s)", told)
    if has_graphs and not is_trial:
        begin = time.monotonic()
        context = config.model.max_context or architecture.max_context
        draw = choose_draw(config.parallel, cache.pool.device)
        count = engine.record_graphs(config.scheduler.max_batch_size, context, CudaRecorder(), draw)
        if is_first:
            _log.info("recorded %d graphs in %.1f s", count, time.monotonic() - begin)
    return engine


def _kernel_obstacle(stage: Stage, architecture: Architecture, cache: KvCache) -> str | None:
    """Why this rank cannot use the kernels, None if it can."""
    if obstacle := _triton_obstacle(cache.pool.device):
        return obstacle
    linear = stage.layers[0].self_attention.linear_qkv
    if not isinstance(linear, ColumnLinear):
        return "the layers are Transformer Engine's (model.layer_spec)"
    if missing := _missing_kernel(architecture):
        return f"the kernels have no {missing}"
    if architecture.head_dim % 2 or architecture.head_dim > _MAX_KERNEL_HEAD_DIM:
        return f"the kernels have no head_dim of {architecture.head_dim}"
    capability = _capability(cache.pool.device)
    if (linear.is_float8 or cache.is_quantized) and capability < FIRST_FLOAT8_CAPABILITY:
        return "the kernels have no 8 bits on a GPU of compute capability {}.{}".format(*capability)
    return None


def _missing_kernel(architecture: Architecture) -> str | None:
    """What an architecture has and only torch computes on a GPU."""
    ropes = [architecture.attention_kind(n).rope for n in range(architecture.num_layers)]
    missing = {
        "rotation of a part of a head": any(rope and rope.size for rope in ropes),
        "layers without norms before them": not architecture.pre_norms,
        "norm over all heads": architecture.qk_norm == "projection",
        "scale of the residual": architecture.residual_scale != 1.0,
    }
    return next((said for said, applies in missing.items() if applies), None)


@functools.cache
def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot be used, None if it can: a kernel is compiled and started.

    It needs a compiler for C and the headers of Python besides itself.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if (capability := _capability(device)) < _FIRST_KERNEL_CAPABILITY:
        return "the kernels need compute capability 8.0, the GPU has {}.{}".format(*capability)
    from fastserve_mega.worker.kernels.rows import Norm, norm

    row = torch.ones((1, 16), device=device)
    try:
        norm(row, Norm(row[0], None, epsilon=1.0, is_centered=False, offset=0.0))
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"Triton cannot compile here: {said[:_LONGEST_REASON]}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _obstacle(
    model: ModelConfig, architecture: Architecture, partition: Partition, cache: KvCache
) -> str | None:
    """Why this rank cannot compute natively, None if it can."""
    try:
        load_library()
    except NativeError as error:
        return f"native step: {error}"
    dtype = cache.dtype
    head_bytes = architecture.head_dim * cache.block_size * dtype.itemsize
    obstacles = {
        "no 8-bit KV cache": cache.is_quantized,
        "no fp8 weights": model.quantization == "fp8",
        f"no {str(dtype).removeprefix('torch.')}": dtype not in (torch.float32, torch.bfloat16),
        "no mixture of experts": architecture.experts is not None,
        "no norm over the heads of several ranks": (
            architecture.qk_norm == "projection" and partition.tensor_size > 1
        ),
        f"no head_dim above {_MAX_HEAD_DIM}": architecture.head_dim > _MAX_HEAD_DIM,
        f"no heads of less than {_READ_AHEAD_BYTES} bytes in a block": (
            head_bytes < _READ_AHEAD_BYTES
        ),
    }
    if dtype == torch.bfloat16:
        # It computes bfloat16 in pairs.
        obstacles |= {
            f"no odd hidden size, {architecture.hidden_size}": architecture.hidden_size % 2 != 0,
            f"no odd ffn size, {len(partition.ffn_columns)}": len(partition.ffn_columns) % 2 != 0,
            f"no odd head_dim, {architecture.head_dim}": architecture.head_dim % 2 != 0,
            f"no odd kv_cache.block_size, {cache.block_size}": cache.block_size % 2 != 0,
        }
    found = next((said for said, applies in obstacles.items() if applies), None)
    return None if found is None else f"the native step has {found}"


def _agreed(
    obstacle: str | None,
    group: dist.ProcessGroup | None = None,
    device: torch.device = _CPU,
) -> str | None:
    """The obstacle of this rank, or that another one of a group (None: of all) has some."""
    if dist.get_world_size(group) == 1:
        return obstacle
    obstacles = torch.tensor([0 if obstacle is None else 1], device=device)
    dist.all_reduce(obstacles, group=group)
    if obstacle is None and obstacles.item():
        return "another rank cannot compute so"
    return obstacle
