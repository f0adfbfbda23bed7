"""Frozen configuration; never changed after it was read (`config_file.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from fastserve_mega.system.hardware import HardwareConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and in which precision."""

    path: str
    """Directory with config.json, tokenizer and weights, either *.safetensors or a distributed
    checkpoint of Megatron; ~ is expanded. Or a name on the Hugging Face hub, like
    Qwen/Qwen2.5-0.5B, if there is no such directory."""
    served_name: str | None = None
    """Name in the API; None takes the directory's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the hardware computes in it, else float32."""
    max_context: int | None = None
    """Tokens of prompt and answer together; None takes the model's own limit."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers: Megatron's own (with NVIDIA Apex's fused LayerNorm where it is installed and
    there is a CUDA device) or Transformer Engine's; auto takes Transformer Engine's if it can."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "model.path must not be empty")
        _require(
            self.max_context is None or self.max_context >= 2,
            f"model.max_context must be at least 2, got {self.max_context}",
        )

    @property
    def directory(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def name(self) -> str:
        return self.served_name or self.directory.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The mesh of ranks: data x pipeline x tensor, the last of them next to each other."""

    tensor: int = 1
    """Ranks that share each layer."""
    pipeline: int = 1
    """Stages: ranks with some of the layers each."""
    data: int = 1
    """Replicas: copies of the model, each on tensor x pipeline ranks of its own. A request goes to
    the one where the least work is expected."""
    expert: int = 1
    """Parts into which the tensor ranks of a stage divide its experts; each part's
    tensor / expert ranks share every expert of theirs along the feed-forward columns."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each pipeline stage; None splits as evenly as possible, extra layers first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is such a device, else cpu."""
    threads_per_rank: int | None = None
    """CPU threads of a rank; None divides the cores of the machine among its ranks."""
    timeout_s: float = 120.0
    """Longest wait of a rank for another one before it gives up."""

    def __post_init__(self) -> None:
        _require(self.tensor >= 1, f"parallel.tensor must be at least 1, got {self.tensor}")
        _require(self.pipeline >= 1, f"parallel.pipeline must be at least 1, got {self.pipeline}")
        _require(self.data >= 1, f"parallel.data must be at least 1, got {self.data}")
        _require(
            self.expert >= 1 and self.tensor % self.expert == 0,
            f"parallel.expert must divide parallel.tensor={self.tensor}, got {self.expert}",
        )
        _require(
            self.layers_per_stage is None or len(self.layers_per_stage) == self.pipeline,
            f"parallel.layers_per_stage must name {self.pipeline} stages (parallel.pipeline), "
            f"got {self.layers_per_stage}",
        )
        _require(
            self.layers_per_stage is None or min(self.layers_per_stage) >= 1,
            f"parallel.layers_per_stage must be positive, got {self.layers_per_stage}",
        )
        _require(
            self.threads_per_rank is None or self.threads_per_rank >= 1,
            f"parallel.threads_per_rank must be at least 1, got {self.threads_per_rank}",
        )
        _require(self.timeout_s > 0, f"parallel.timeout_s must be positive, got {self.timeout_s}")

    @property
    def replica_size(self) -> int:
        """Ranks of one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        return self.data * self.replica_size


SwapStrategy = Literal["proactive", "reactive", "recompute", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapConfig:
    """What happens to the KV of preempted requests (paper section 4.2)."""

    strategy: SwapStrategy = "proactive"
    """proactive: to the host ahead of need; reactive: to the host at the moment of need;
    recompute: dropped and prefilled again; none: no request is preempted for memory."""
    write_through_blocks: int = 16
    """Full blocks copied to the host per step while nothing else is, so that a later preemption
    finds them clean; 0 switches it off. For `proactive` only."""
    write_through_occupancy: float = 0.5
    """Share of the device pool in use from which on blocks are written through."""

    def __post_init__(self) -> None:
        _require(
            self.write_through_blocks >= 0,
            "kv_cache.swap.write_through_blocks must not be negative, got "
            f"{self.write_through_blocks}",
        )
        _require(
            0.0 <= self.write_through_occupancy <= 1.0,
            "kv_cache.swap.write_through_occupancy must be between 0 and 1, got "
            f"{self.write_through_occupancy}",
        )

    @property
    def uses_host(self) -> bool:
        """Whether preempted KV moves to a host pool."""
        return self.strategy in ("proactive", "reactive")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheConfig:
    """The paged KV pools. A block holds `block_size` tokens of all layers of a rank."""

    block_size: int = 16
    """Tokens in a block."""
    device_blocks: int | None = None
    """Blocks on the device, the null block included; None sizes the pool by memory."""
    device_memory_gb: float | None = None
    """Memory of each rank's device pool when device_blocks is None. None takes, on CUDA, what
    device_memory_utilization leaves; on a CPU, 1 GB."""
    device_memory_utilization: float = 0.9
    """Share of a CUDA device's memory for weights, activations and KV together."""
    host_blocks: int | None = None
    """Blocks in host memory, the null block included; None sizes the pool by memory. Only swap
    strategies that swap have a host pool."""
    host_memory_gb: float = 1.0
    """Memory of each rank's host pool when host_blocks is None."""
    prefix_cache: bool = True
    """Keep the KV of full blocks for requests that begin with the same tokens."""
    swap: SwapConfig = field(default_factory=SwapConfig)

    def __post_init__(self) -> None:
        _require(
            self.block_size >= 1, f"kv_cache.block_size must be at least 1, got {self.block_size}"
        )
        _require(
            self.device_blocks is None or self.device_blocks >= 2,
            f"kv_cache.device_blocks must be at least 2 (block 0 is the null block), "
            f"got {self.device_blocks}",
        )
        _require(
            self.device_memory_gb is None or self.device_memory_gb > 0,
            f"kv_cache.device_memory_gb must be positive, got {self.device_memory_gb}",
        )
        _require(
            0 < self.device_memory_utilization <= 1,
            "kv_cache.device_memory_utilization must be above 0 and at most 1, "
            f"got {self.device_memory_utilization}",
        )
        _require(
            self.host_blocks is None or self.host_blocks >= 0,
            f"kv_cache.host_blocks must not be negative, got {self.host_blocks}",
        )
        _require(
            self.host_memory_gb >= 0,
            f"kv_cache.host_memory_gb must not be negative, got {self.host_memory_gb}",
        )


_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

PolicyName = Literal["skip_join_mlfq", "mlfq", "fcfs", "fixed_priority", "srpt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlfqConfig:
    """The multi-level feedback queue (paper section 4.1)."""

    levels: int = 10
    """Number of levels."""
    base_quantum_s: float | None = None
    """Quantum of the highest level, seconds; None takes the decode time at batch 1."""
    quantum_ratio: float = 2.0
    """Quantum of a level over that of the level above it."""
    starvation_limit_s: float | None = 0.3
    """A request that waited this long since it last ran returns to the highest level;
    None switches promotion off."""
    prefill_patience: float = 0.0
    """A request that has no KV yet waits so many times its own prefill longer for that. 0 is the
    paper's rule, under which every overload by long prompts returns to the order of arrival."""

    def __post_init__(self) -> None:
        _require(self.levels >= 1, f"scheduler.mlfq.levels must be at least 1, got {self.levels}")
        _require(
            self.base_quantum_s is None or self.base_quantum_s > 0,
            f"scheduler.mlfq.base_quantum_s must be positive, got {self.base_quantum_s}",
        )
        _require(
            self.quantum_ratio > 1.0,
            f"scheduler.mlfq.quantum_ratio must exceed 1, got {self.quantum_ratio}",
        )
        _require(
            self.prefill_patience >= 0,
            f"scheduler.mlfq.prefill_patience must not be negative, got {self.prefill_patience}",
        )
        _require(
            self.starvation_limit_s is None or self.starvation_limit_s > 0,
            f"scheduler.mlfq.starvation_limit_s must be positive, got {self.starvation_limit_s}",
        )


AdmissionRule = Literal["projected", "greedy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Who runs in the next step, and how much of it."""

    policy: str = "skip_join_mlfq"
    """Who comes first (docs/scheduling.md): skip_join_mlfq, mlfq, fcfs, fixed_priority, srpt (which
    knows the future, so for the simulator only), or a class of your own as module:Class."""
    max_batch_size: int = 16
    """Requests in one step."""
    max_batch_tokens: int = 512
    """Tokens in one step; longer prompts are prefilled in chunks of at most this."""
    max_queued_requests: int = 100_000
    """Unfinished requests held at once; one more is rejected."""
    admission: AdmissionRule = "projected"
    """projected: a request is started only when the KV of all started ones is expected to fit on
    device and host, with the answers they still get; greedy: whenever its prompt fits now. What
    does not fit is dropped and computed again."""
    backfill_lookahead: int = 16
    """How many requests that find no memory are passed over in one step in search of one that
    does."""
    max_passed_over: int = 64
    """Steps a request may be passed over; then no request behind it is given memory before it."""
    profile: str | None = None
    """File that `fastserve-mega profile` wrote; ~ is expanded. None measures a few steps at
    start-up instead."""
    mlfq: MlfqConfig = field(default_factory=MlfqConfig)

    def __post_init__(self) -> None:
        known = get_args(PolicyName)
        _require(
            self.policy in known or bool(_CLASS_PATH.fullmatch(self.policy)),
            f"scheduler.policy must be one of {', '.join(known)}, or a class of your own as "
            f"my_package.my_module:Class, got {self.policy!r}",
        )
        for name in ("max_batch_size", "max_batch_tokens", "max_queued_requests"):
            value = getattr(self, name)
            _require(value >= 1, f"scheduler.{name} must be at least 1, got {value}")
        for name in ("backfill_lookahead", "max_passed_over"):
            value = getattr(self, name)
            _require(value >= 0, f"scheduler.{name} must not be negative, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """Where the coordinator listens, and how long it waits."""

    client_endpoint: str = "tcp://127.0.0.1:5570"
    """ZeroMQ address for clients; port 0 picks a free one."""
    worker_endpoint: str = "tcp://127.0.0.1:0"
    """ZeroMQ address for the ranks; port 0 picks a free one, told to the ranks over MPI."""
    startup_timeout_s: float = 600.0
    """Longest wait for all ranks to have loaded the model."""
    step_timeout_s: float = 120.0
    """Longest wait for a dispatched step; then the workers are taken for lost."""
    client_buffer_messages: int = 10_000
    """Unsent messages held per client; a slower reader's requests are aborted."""
    client_timeout_s: float = 30.0
    """A client silent for this long is taken for gone and its requests are aborted."""
    drain_timeout_s: float = 5.0
    """On SIGTERM, how long running requests may go on before they end with `error`."""
    event_log: str | None = None
    """File for everything the scheduler is told and answers, for `fastserve-mega replay`; ~ is
    expanded, an existing file is replaced. None records nothing."""

    def __post_init__(self) -> None:
        for name in (
            "startup_timeout_s", "step_timeout_s", "client_buffer_messages", "client_timeout_s",
            "drain_timeout_s",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value > 0, f"coordinator.{name} must be positive, got {value}")


ToolParserName = Literal["auto", "hermes", "llama3_json", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The OpenAI-compatible HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of them."""
    port: int = 8000
    """TCP port to listen on."""
    live_view: bool = True
    """Show what the scheduler is doing on a web page at /."""
    api_key_file: str | None = None
    """File with one key per line, of which a client must send one as `Authorization: Bearer KEY`;
    ~ is expanded. None asks for none. Health, metrics and the live view need no key."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may ask from a browser; `*` is all of them."""
    tool_parser: ToolParserName = "auto"
    """How the model writes calls of tools; auto goes by its chat template, none refuses tools."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.port <= 65535, f"server.port must be between 0 and 65535, got {self.port}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything a deployment says about itself; `configs/smollm2-135m-cpu.yaml` explains it."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
