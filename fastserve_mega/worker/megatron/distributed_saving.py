"""Writes Megatron's distributed checkpoints (`torch_dist`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.megatron.distributed_checkpoint import one_sentence, sharded_tensors
from fastserve_mega.worker.megatron.model import Stage

_COMMON_FILE = "common.pt"
"""What a trainer has to say besides; Megatron wants it to be there."""
Fill = Callable[[str, tuple[int, ...]], Tensor]
"""Makes the values of a part of a tensor: (name, offset of the part) → a tensor on the CPU."""


def save_tensors(directory: Path, tensors: Sequence[Any], fill: Fill | None = None) -> None:
    """Write sharded tensors as a checkpoint; all ranks call it together.

    Args:
        directory: empty or absent.
        tensors: the parts that this rank has.
        fill: makes the values of parts whose data is on the meta device, one by one as they are
            written, so that no more than one is in memory.

    Raises:
        ValueError: a file cannot be written, on whichever rank that was.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Any]] = {}
    for tensor in tensors:
        if is_main_replica(tensor.replica_id):
            parts.setdefault(tensor.key, []).append(tensor)
    with one_sentence(directory):
        # Torch's plain writer in place of Megatron's, which forks processes and needs CUDA.
        torch_checkpoint.save(  # type: ignore[attr-defined] # public, but not exported
            mcore_to_pyt_state_dict(parts),
            storage_writer=FileSystemWriter(directory, overwrite=False),
            planner=_FillingPlanner(fill),
        )
    if torch.distributed.get_rank() == 0:
        torch.save({}, directory / _COMMON_FILE)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    torch.distributed.barrier()


def save_stage(
    directory: Path, stage: Stage, architecture: Architecture, partition: Partition
) -> None:
    """Write the weights of all ranks as one checkpoint; all ranks call it together.

    Args:
        directory: empty or absent.
        stage: with weights that are not packed.
        architecture: of the model.
        partition: of this rank.

    Raises:
        ValueError: ranks hold copies of the same key-value head.
    """
    if partition.tensor_size > architecture.num_kv_heads:
        raise ValueError(
            f"{partition.tensor_size} tensor-parallel ranks cannot save the "
            f"{architecture.num_kv_heads} key-value heads of which they hold copies; save with "
            f"parallel.tensor={architecture.num_kv_heads} or less"
        )
    save_tensors(
        directory, [tensor for _, tensor in sharded_tensors(stage, architecture, partition)]
    )


class _FillingPlanner(MCoreSavePlanner):  # type: ignore[misc] # megatron is untyped
    """Asks for the values of a tensor when it is written."""

    def __init__(self, fill: Fill | None) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._fill = fill

    def lookup_object(self, index: Any) -> Any:
        found = super().lookup_object(index)
        if self._fill is not None and found.is_meta:
            return self._fill(index.fqn, tuple(index.offset))
        return found
