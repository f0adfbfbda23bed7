"""MegatronRunner: executes batches on one rank of the mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastserve_mega.models.architecture import Architecture, load_architecture
from fastserve_mega.system.config import Config
from fastserve_mega.system.host_memory import HostMemory, host_memory
from fastserve_mega.system.partition import partition_model
from fastserve_mega.system.sizes import block_bytes, host_blocks
from fastserve_mega.worker.embeddings import Embeddings
from fastserve_mega.worker.grammar import Grammars
from fastserve_mega.worker.host_pool import HostPool, open_copy_engine
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.loading_progress import show_progress
from fastserve_mega.worker.logprobs import PromptScores
from fastserve_mega.worker.megatron.checkpoint import architecture_as_stored, open_checkpoint
from fastserve_mega.worker.megatron.engine import StageEngine, TakeRows, TakesDrawn
from fastserve_mega.worker.megatron.engine_choice import choose_draw, open_engine, records_graphs
from fastserve_mega.worker.megatron.initialize import (
    connect_stages,
    join_process_groups,
    keep_freed_memory,
    left_on_error,
    plain_errors,
    select_device,
    select_dtype,
    set_up_cpu,
)
from fastserve_mega.worker.megatron.layer_spec import choose_layers, log_choice
from fastserve_mega.worker.megatron.model import build_stage
from fastserve_mega.worker.megatron.native_engine import NativeEngine
from fastserve_mega.worker.megatron.stage_link import StageLink
from fastserve_mega.worker.memory import (
    check_host_memory,
    device_blocks,
    host_memory_needs,
    is_sized_by_memory,
    measure_activations,
)
from fastserve_mega.worker.model_runner import Ask, Launched, SequenceInput, StepOutput
from fastserve_mega.worker.sampler import Sampler
from fastserve_mega.worker.topology import Topology
from fastserve_mega.worker.transfer import Stopwatch, wait_for
from fastserve_mega.worker.trial_steps import largest_steps, varied_steps

T = TypeVar("T")


class MegatronRunner:
    """Holds one rank's layers, weights and KV pool. See `ModelRunner` for the contract.

    Args:
        config: the deployment.
        topology: this rank among those of its replica; rank = pipeline stage * parallel.tensor +
            tensor rank.
        master_address: host of the replica's rank 0, reachable from its other ranks.
        master_port: free port there; not used by a lone rank.

    Raises:
        ValueError: the model cannot be read, or cannot be split over these ranks.
    """

    def __init__(
        self, config: Config, topology: Topology, master_address: str, master_port: int
    ) -> None:
        directory = config.model.directory
        architecture = load_architecture(directory, config.model.max_context)
        _check_context(config, architecture)
        self.architecture = architecture = architecture_as_stored(directory, architecture)
        self._partition = partition = partition_model(
            architecture, config.parallel, topology.rank, topology.world_size
        )
        checkpoint = open_checkpoint(directory, architecture, partition)
        self._device = select_device(config.parallel, topology)
        self._dtype = select_dtype(config.model, self._device)
        set_up_cpu(config.parallel, topology)
        float8 = config.model.quantization == "fp8"
        choice = choose_layers(config.model.layer_spec, architecture, self._device, float8=float8)
        if topology.rank == 0:
            log_choice(choice)
        eos = architecture.eos_token_ids
        grammars = Grammars(directory, architecture.vocab_size, eos)
        draw = choose_draw(config.parallel, self._device)
        self._sampler = Sampler(eos, grammars, draw)
        self._link = StageLink(partition, architecture.hidden_size, self._device)
        # Before any rank of this host allocates: they leave the next line together.
        memory = host_memory()
        groups = join_process_groups(
            config.parallel, topology, self._device, master_address, master_port
        )
        with plain_errors(self._device), left_on_error():
            if self._device.type == "cuda":
                connect_stages(topology, config.parallel.tensor, self._device)
            self._stage = build_stage(
                architecture, partition, groups, choice, dtype=self._dtype, device=self._device
            )
            block = block_bytes(architecture, partition, config.kv_cache, self._dtype.itemsize)
            self._check_host_memory(config, block, topology.local_size, memory)
            action, num_bytes = f"loading {config.model.name}", self._stage.num_bytes
            with show_progress(action, num_bytes, shown=topology.rank == 0) as report:
                checkpoint.load(self._stage, report)
            self.cache = self._build_cache(config, self._device_blocks(config, block))
            self._engine = open_engine(config, self._stage, architecture, partition, self.cache)
            self.block_size = self.cache.block_size
            is_native = isinstance(self._engine, NativeEngine)
            self.looks_ahead = is_native and config.parallel.looks_ahead
            can_launch = draw is not None and isinstance(self._engine, TakesDrawn)
            self.launches_ahead = can_launch and config.parallel.looks_ahead
            if self._device.type == "cuda":
                self._try(self._engine, varied_steps(config, self._max_context(config)))
            keep_freed_memory()
            self._host = HostPool(host_blocks(config.kv_cache, self.block_bytes), self.cache.pool)
            self.copies = open_copy_engine(self.cache.pool, self._host, config.parallel.timeout_s)

    @property
    def device_blocks(self) -> int:
        """Blocks of this rank's pool, the null block included."""
        return self.cache.num_blocks

    @property
    def host_blocks(self) -> int:
        """Blocks of its pool in host memory; 0 when the strategy does not swap."""
        return self._host.num_blocks

    @property
    def block_bytes(self) -> int:
        """Memory of this rank's share of a block."""
        return self.cache.pool[0].nbytes

    @property
    def is_sampling_rank(self) -> bool:
        """True on tensor rank 0 of the last stage."""
        return self._partition.is_last_stage and self._partition.tensor_rank == 0

    @torch.inference_mode()
    def execute(self, batch: Sequence[SequenceInput]) -> StepOutput:
        """Run one step; all ranks are called with the same batches in the same order.

        Raises:
            ValueError: a sequence without tokens, or with too few blocks.
            ConnectionError: another rank does not take part.
            MemoryError: the device has too little memory for it.
        """
        if not batch:
            return StepOutput()
        with plain_errors(self._device):
            return self._execute(batch)

    def _execute(self, batch: Sequence[SequenceInput]) -> StepOutput:
        if self.is_sampling_rank:
            self._sampler.prepare(batch)
        sampled = [sequence for sequence in batch if sequence.samples]
        scores, embeddings = PromptScores(batch), Embeddings(batch)
        drawn: list[Tensor] = []
        wanted: list[TakeRows] = []
        if self.is_sampling_rank:
            wanted = [scores, embeddings, drawn.append]
        result = self._engine.run(
            batch, lambda: self._link.receive(batch, self._engine.hidden_dtype), *wanted
        )
        if not self._partition.is_last_stage:
            self._link.send(result)
            return StepOutput()
        if not self.is_sampling_rank:
            return StepOutput()
        if not sampled:
            # The coordinator charges the time until the result comes.
            wait_for(self._device)
        output = self._sampler(result, sampled, *drawn) if sampled else StepOutput()
        return replace(output, scored=scores.result(), embeddings=embeddings.result())

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceInput]) -> Launched:
        """Give the device a step. Raises like `execute`, here or where the result is waited for."""
        with plain_errors(self._device):
            watch = Stopwatch(self._device)
            if all(sequence.is_plain for sequence in batch):
                wait = self._launch(batch)
            else:
                wait = partial(_same, self._execute(batch))
            watch.stop()

        def result() -> StepOutput:
            with plain_errors(self._device):
                return replace(wait(), compute_s=watch.seconds())

        return result

    def _launch(self, batch: Sequence[SequenceInput]) -> Callable[[], StepOutput]:
        assert isinstance(self._engine, TakesDrawn), "it does not launch ahead"
        drawn: list[Tensor] = []
        logits = self._engine.run(batch, lambda: None, drawn=drawn.append)
        tokens, wait = self._sampler.start(logits, batch, *drawn)
        self._engine.keep_drawn(tokens)
        return wait

    @torch.inference_mode()
    def execute_ahead(self, batch: Sequence[SequenceInput], ask: Ask) -> StepOutput | None:
        """Run a step of decodes whose command may not come; None when `ask` ended it."""
        assert isinstance(self._engine, NativeEngine), "it does not look ahead"
        with plain_errors(self._device):
            self._sampler.prepare(batch)
            logits = self._engine.run_ahead(batch, ask)
            return None if logits is None else self._sampler(logits, batch)

    def close(self) -> None:
        """End the copies, leave the process groups and free the pools. Call once."""
        self.copies.close()
        self._host.close()
        self._link.finish()
        self._engine.close()
        dist.destroy_process_group()
        del self._stage, self._engine, self.cache, self._host, self.copies

    def _check_host_memory(
        self, config: Config, block: int, ranks: int, memory: HostMemory | None
    ) -> None:
        """Refuse what this host has no memory for, before it is taken."""
        needs = host_memory_needs(
            config, self.architecture, block, self._device, self._stage.num_bytes
        )
        available = None if memory is None else memory.available
        check_host_memory(needs, ranks, available, is_final=self._device.type == "cpu")

    def _device_blocks(self, config: Config, block: int) -> int:
        """Blocks of the device pool; where its memory decides, the largest steps run first."""
        activations = None
        if is_sized_by_memory(config.kv_cache, self._device):
            activations = self._measure_activations(config)
        return device_blocks(config, self.architecture, block, self._device, activations)

    def _measure_activations(self, config: Config) -> int:
        """Bytes that the largest steps take. All ranks run them together."""
        cache = self._build_cache(config, 2)
        # Opened before what it takes is measured: it lays experts out anew.
        engine = open_engine(
            config, self._stage, self.architecture, self._partition, cache, is_trial=True
        )
        steps = largest_steps(config, self._max_context(config))
        taken = measure_activations(self._device, lambda: self._try(engine, steps))
        if records_graphs(config.parallel, engine):
            # What the largest of them takes stays theirs, beside what other steps take.
            taken += measure_activations(self._device, lambda: self._try(engine, steps[1:]))
        engine.close()
        return taken

    def _try(self, engine: StageEngine, steps: Iterable[Sequence[SequenceInput]]) -> None:
        """Compute steps that nobody asked for; nothing is handed over between stages."""
        for batch in steps:
            tokens = sum(len(sequence.token_ids) for sequence in batch)
            shape = (tokens, self.architecture.hidden_size)
            hidden: Tensor | None = None
            if not self._partition.is_first_stage:
                hidden = torch.zeros(shape, dtype=engine.hidden_dtype, device=self._device)
            result = engine.run(batch, partial(_same, hidden))
            if self.is_sampling_rank:
                self._sampler(result, batch)

    def _max_context(self, config: Config) -> int:
        return config.model.max_context or self.architecture.max_context

    def _build_cache(self, config: Config, num_blocks: int) -> KvCache:
        return KvCache(
            num_blocks=num_blocks,
            num_layers=len(self._partition.layers),
            num_kv_heads=len(self._partition.kv_heads),
            block_size=config.kv_cache.block_size,
            head_dim=self.architecture.head_dim,
            dtype=self._dtype,
            device=self._device,
            quantized=config.kv_cache.is_quantized,
        )


def _check_context(config: Config, architecture: Architecture) -> None:
    wanted = config.model.max_context
    if wanted is not None and wanted > architecture.max_context:
        raise ValueError(
            f"model.max_context={wanted} exceeds the {architecture.max_context} tokens that the "
            f"model can attend to"
        )


def _same(given: T) -> T:
    return given
