"""Which part of the model a rank holds. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class Partition:
    """The share of one rank: a range of layers, and of each layer a range of heads.

    Ranks are numbered stage by stage: rank = stage * tensor_size + tensor_rank. The tensor ranks
    of a stage also divide its experts: tensor_rank = expert_rank * (tensor_size / expert_size) +
    rank among those that hold the same experts.
    """

    stage: int
    num_stages: int
    tensor_rank: int
    tensor_size: int
    expert_size: int
    """Parts into which the tensor ranks divide the experts."""
    layers: range
    """Layers of this rank's pipeline stage, by their number in the whole model."""
    query_heads: range
    kv_heads: range
    """Key-value heads this rank holds; when there are fewer of them than tensor ranks, several
    ranks hold the same one."""
    ffn_columns: range
    experts: range
    """The experts of each layer that this rank has a part in; empty in a model without experts."""
    expert_columns: range
    """Columns of each of those experts that this rank holds."""
    shared_expert_columns: range
    vocab_rows: range
    """Rows of the embedding and of the output layer, padding included."""
    padded_vocab_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1


def split_layers(num_layers: int, parallel: ParallelConfig) -> tuple[range, ...]:
    """Layers of each pipeline stage.

    Raises:
        ValueError: more stages than layers, or layers_per_stage does not add up.
    """
    stages = parallel.pipeline
    if stages > num_layers:
        raise ValueError(
            f"parallel.pipeline={stages} stages are too many for a model of {num_layers} layers"
        )
    counts = parallel.layers_per_stage
    if counts is None:
        whole, extra = divmod(num_layers, stages)
        counts = tuple(whole + (stage < extra) for stage in range(stages))
    if sum(counts) != num_layers:
        raise ValueError(
            f"parallel.layers_per_stage={list(counts)} adds up to {sum(counts)} layers, "
            f"the model has {num_layers}"
        )
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def check_partition(architecture: Architecture, parallel: ParallelConfig) -> None:
    """See that the model can be split as it is to be.

    Raises:
        ValueError: it cannot; the message names value and limit.
    """
    for rank in range(parallel.replica_size):
        partition_model(architecture, parallel, rank, parallel.replica_size)


def partition_model(
    architecture: Architecture, parallel: ParallelConfig, rank: int, world_size: int
) -> Partition:
    """The share of one rank among the `world_size` ranks of its replica.

    Raises:
        ValueError: the model cannot be split this way; the message names value and limit.
    """
    if world_size != parallel.replica_size:
        raise ValueError(
            f"{world_size} ranks were started, but parallel.tensor={parallel.tensor} times "
            f"parallel.pipeline={parallel.pipeline} needs {parallel.replica_size}"
        )
    size = parallel.tensor
    _check_divisible(architecture, size)
    _check_experts(architecture, parallel)
    stage, tensor_rank = divmod(rank, size)
    expert_rank, rank_in_part = divmod(tensor_rank, size // parallel.expert)
    experts = architecture.experts
    padded_vocab_size = math.ceil(architecture.vocab_size / size) * size
    return Partition(
        stage=stage,
        num_stages=parallel.pipeline,
        tensor_rank=tensor_rank,
        tensor_size=size,
        expert_size=parallel.expert,
        layers=split_layers(architecture.num_layers, parallel)[stage],
        query_heads=_share(architecture.num_heads, tensor_rank, size),
        kv_heads=_share(architecture.num_kv_heads, tensor_rank, size),
        ffn_columns=_share(architecture.ffn_hidden_size, tensor_rank, size),
        experts=_share(experts.count, expert_rank, parallel.expert) if experts else range(0),
        expert_columns=(
            _share(experts.ffn_hidden_size, rank_in_part, size // parallel.expert)
            if experts
            else range(0)
        ),
        shared_expert_columns=(
            _share(experts.shared_ffn_hidden_size, tensor_rank, size)
            if experts and experts.shared_ffn_hidden_size
            else range(0)
        ),
        vocab_rows=_share(padded_vocab_size, tensor_rank, size),
        padded_vocab_size=padded_vocab_size,
    )


def _share(total: int, tensor_rank: int, size: int) -> range:
    """The rank's part of `total` things; one thing shared by ranks when there are fewer."""
    start = total * tensor_rank // size
    return range(start, start + max(1, total // size))


def _check_divisible(architecture: Architecture, size: int) -> None:
    divided = [("attention heads", architecture.num_heads)]
    experts = architecture.experts
    if experts is None or experts.dense_layers:
        divided.append(("feed-forward columns", architecture.ffn_hidden_size))
    if experts and experts.shared_ffn_hidden_size:
        divided.append(("columns of the shared expert", experts.shared_ffn_hidden_size))
    for what, count in divided:
        if count % size != 0:
            raise ValueError(f"{count} {what} cannot be divided among parallel.tensor={size} ranks")
    kv_heads = architecture.num_kv_heads
    if kv_heads % size != 0 and size % kv_heads != 0:
        raise ValueError(
            f"{kv_heads} key-value heads can neither be divided among nor replicated over "
            f"parallel.tensor={size} ranks"
        )


def _check_experts(architecture: Architecture, parallel: ParallelConfig) -> None:
    experts, parts = architecture.experts, parallel.expert
    if experts is None:
        if parts > 1:
            raise ValueError(f"parallel.expert={parts}, but {architecture.name} has no experts")
        return
    if experts.count % parts != 0:
        raise ValueError(f"{experts.count} experts cannot be divided by parallel.expert={parts}")
    sharing = parallel.tensor // parts
    if experts.ffn_hidden_size % sharing != 0:
        raise ValueError(
            f"{experts.ffn_hidden_size} columns of an expert cannot be divided among the {sharing} "
            f"ranks that parallel.tensor={parallel.tensor} / parallel.expert={parts} leaves it"
        )
