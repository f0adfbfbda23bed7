"""Frozen configuration; never changed after it was read (`config_file.py`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from msgspec import Meta, field

from fastserve_mega.records import Count, Fraction, PositiveFloat, PositiveInt, Record
from fastserve_mega.system.hardware import HardwareConfig

TimeLimit = Annotated[float, Meta(gt=0, le=1e6)]
"""Seconds; eleven days are as good as no limit, and libzmq and torch count up to it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class ModelConfig(Record, frozen=True, kw_only=True):
    """Which model, and in which precision."""

    path: Annotated[str, Meta(min_length=1)]
    """Directory with config.json, tokenizer and weights, either *.safetensors or a distributed
    checkpoint of Megatron; ~ is expanded. Or a name on the Hugging Face hub, like
    Qwen/Qwen2.5-0.5B, if there is no such directory."""
    served_name: str | None = None
    """Name in the API; None takes the directory's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the hardware computes in it, else float32."""
    quantization: Literal["none", "fp8", "int8"] = "none"
    """How linear layers keep their weights (not embeddings, norms, routers and the output layer):
    fp8 is 8 bits (e4m3) with a scale for each output, read from a checkpoint in fp8 or made while
    others are loaded, and products in 8 bits on GPUs that have them; none is dtype, which a
    checkpoint in fp8 becomes as well (docs/checkpoints.md). int8 is for the native step on CPUs,
    and faster there: 8 bits of all matrices, with a scale for every 64 inputs of an output, made
    when they are loaded (docs/models.md)."""
    max_context: Annotated[int, Meta(ge=2)] | None = None
    """Tokens of prompt and answer together; None takes the model's own limit."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers: Megatron's own (with NVIDIA Apex's fused LayerNorm where it is installed and
    there is a CUDA device) or Transformer Engine's; auto takes Transformer Engine's if it can."""

    @property
    def directory(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def name(self) -> str:
        return self.served_name or self.directory.name


class ParallelConfig(Record, frozen=True, kw_only=True):
    """The mesh of ranks: data x pipeline x tensor, the last of them next to each other."""

    tensor: PositiveInt = 1
    """Ranks that share each layer."""
    pipeline: PositiveInt = 1
    """Stages: ranks with some of the layers each."""
    data: PositiveInt = 1
    """Replicas: copies of the model, each on tensor x pipeline ranks of its own. A request goes to
    the one where the least work is expected."""
    expert: PositiveInt = 1
    """Parts into which the tensor ranks of a stage divide its experts; each part's
    tensor / expert ranks share every expert of theirs along the feed-forward columns."""
    layers_per_stage: tuple[PositiveInt, ...] | None = None
    """Layers of each pipeline stage; None splits as evenly as possible, extra layers first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is such a device, else cpu."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of a rank; None divides the cores of the machine among its ranks."""
    cpu_engine: Literal["auto", "native", "torch"] = "auto"
    """What computes on CPUs: native is one C++ call a step, built where there is a compiler, and
    torch computes every model; auto takes native if it can."""
    cuda_engine: Literal["auto", "graphs", "kernels", "torch"] = "auto"
    """What computes on GPUs: kernels are our own, in Triton, between torch's matrix products;
    graphs are the same with steps that only decode recorded as CUDA graphs at start; torch computes
    every model. auto takes graphs if it can, else kernels, else torch."""
    look_ahead: bool = False
    """A rank that has a copy of the model for itself goes on with the requests of a step while the
    coordinator plans the next one. With the native step, which stops when the plan says anything
    else; where coordinator and clients share its cores it brings nothing (docs/performance.md). And
    with the kernels of GPUs, which have the next step before the host knows the tokens."""
    timeout_s: TimeLimit = 120.0
    """Longest wait of a rank for another one before it gives up."""

    def __post_init__(self) -> None:
        _require(
            self.tensor % self.expert == 0,
            f"parallel.expert must divide parallel.tensor={self.tensor}, got {self.expert}",
        )
        _require(
            self.layers_per_stage is None or len(self.layers_per_stage) == self.pipeline,
            f"parallel.layers_per_stage must name {self.pipeline} stages (parallel.pipeline), "
            f"got {self.layers_per_stage}",
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether ranks compute ahead of their plans, where they can."""
        return self.look_ahead and self.replica_size == 1

    @property
    def replica_size(self) -> int:
        """Ranks of one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        return self.data * self.replica_size


SwapStrategy = Literal["proactive", "reactive", "recompute", "none"]


class SwapConfig(Record, frozen=True, kw_only=True):
    """What happens to the KV of preempted requests (paper section 4.2)."""

    strategy: SwapStrategy = "proactive"
    """proactive: to the host ahead of need; reactive: to the host at the moment of need;
    recompute: dropped and prefilled again; none: no request is preempted for memory."""
    write_through_blocks: Count = 16
    """Full blocks copied to the host per step while nothing else is, so that a later preemption
    finds them clean; 0 switches it off. For `proactive` only."""
    write_through_occupancy: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Share of the device pool in use from which on blocks are written through."""

    @property
    def uses_host(self) -> bool:
        """Whether preempted KV moves to a host pool."""
        return self.strategy in ("proactive", "reactive")


class KvCacheConfig(Record, frozen=True, kw_only=True):
    """The paged KV pools. A block holds `block_size` tokens of all layers of a rank."""

    block_size: PositiveInt = 16
    """Tokens in a block."""
    dtype: Literal["auto", "fp8"] = "auto"
    """Precision of keys and values: auto is that of the model; fp8 is 8 bits (e4m3) with a scale
    for each token and head, so that nearly twice the tokens fit on device and host, and half the
    bytes move between them (docs/memory.md). On a CPU torch computes with it, not the native
    step."""
    device_blocks: Annotated[int, Meta(ge=2, description="block 0 is the null block")] | None = None
    """Blocks on the device, the null block included; None sizes the pool by memory."""
    device_memory_gb: PositiveFloat | None = None
    """Memory of each rank's device pool when device_blocks is None. None takes, on CUDA, what
    device_memory_utilization leaves; on a CPU, 1 GB."""
    device_memory_utilization: Fraction = 0.9
    """Share of a CUDA device's memory for weights, activations and KV together."""
    host_blocks: Count | None = None
    """Blocks in host memory, the null block included; None sizes the pool by memory. Only swap
    strategies that swap have a host pool."""
    host_memory_gb: Annotated[float, Meta(ge=0)] = 1.0
    """Memory of each rank's host pool when host_blocks is None."""
    prefix_cache: bool = True
    """Keep the KV of full blocks for requests that begin with the same tokens."""
    swap: SwapConfig = field(default_factory=SwapConfig)

    @property
    def is_quantized(self) -> bool:
        return self.dtype == "fp8"


_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

PolicyName = Literal["paced", "skip_join_mlfq", "mlfq", "fcfs", "fixed_priority", "srpt"]


class MlfqConfig(Record, frozen=True, kw_only=True):
    """The multi-level feedback queue (paper section 4.1)."""

    levels: PositiveInt = 10
    """Number of levels."""
    base_quantum_s: PositiveFloat | None = None
    """Quantum of the highest level, seconds; None takes the decode time at batch 1."""
    quantum_ratio: Annotated[float, Meta(gt=1)] = 2.0
    """Quantum of a level over that of the level above it."""
    starvation_limit_s: PositiveFloat | None = 0.3
    """A request that waited this long since it last ran returns to the highest level;
    None switches promotion off."""
    prefill_patience: Annotated[float, Meta(ge=0)] = 0.0
    """A request that has no KV yet waits so many times its own prefill longer for that. 0 is the
    paper's rule, under which every overload by long prompts returns to the order of arrival."""


class PacedConfig(Record, frozen=True, kw_only=True):
    """The policy `paced`: what is promised to those who read along."""

    tokens_per_s: PositiveFloat = 12.0
    """How fast somebody reads, at least so many as `tpot_s` needs. An answer that is ahead of its
    reader may pause."""
    ttft_s: PositiveFloat = 1.0
    """When the first token is due. Who cannot have it in time comes after those who can."""
    tpot_s: PositiveFloat = 0.1
    """Mean time per token that has to be kept; no more requests are started than that allows."""
    patience: Annotated[float, Meta(ge=0)] = 100.0
    """Who has waited for so many times its own service starves, and of the requests that are
    started a share is for the starved."""


AdmissionRule = Literal["projected", "greedy"]


class SchedulerConfig(Record, frozen=True, kw_only=True):
    """Who runs in the next step, and how much of it."""

    policy: str = "paced"
    """Who comes first (docs/scheduling.md): paced, skip_join_mlfq, mlfq, fcfs, fixed_priority, srpt
    (which knows the future, so for the simulator only), or a class of your own as module:Class."""
    max_batch_size: PositiveInt = 16
    """Requests in one step."""
    max_batch_tokens: PositiveInt = 512
    """Tokens in one step; longer prompts are prefilled in chunks of at most this."""
    max_queued_requests: PositiveInt = 100_000
    """Unfinished requests held at once; one more is rejected."""
    max_queued_tokens: PositiveInt = 20_000_000
    """Prompt tokens of unfinished requests; when there are so many, one more request is
    rejected."""
    max_wait_s: PositiveFloat | None = 60.0
    """A request that is expected to wait longer for its first step, by the policy's order and the
    rate at which requests start, is rejected at once (docs/reliability.md). Work in the background
    waits as long as it has to. None rejects nobody for that."""
    admission: AdmissionRule = "projected"
    """projected: a request is started only when the KV of all started ones is expected to fit on
    device and host, with the answers they still get; greedy: whenever its prompt fits now. What
    does not fit is dropped and computed again."""
    backfill_lookahead: Count = 16
    """How many requests that find no memory are passed over in one step in search of one that
    does."""
    max_passed_over: Count = 64
    """Steps a request may be passed over; then no request behind it is given memory before it."""
    profile: str | None = None
    """File that `fastserve-mega profile` wrote; ~ is expanded. None measures a few steps at
    start-up instead."""
    mlfq: MlfqConfig = field(default_factory=MlfqConfig)
    paced: PacedConfig = field(default_factory=PacedConfig)

    def __post_init__(self) -> None:
        known = get_args(PolicyName)
        _require(
            self.policy in known or bool(_CLASS_PATH.fullmatch(self.policy)),
            f"scheduler.policy must be one of {', '.join(known)}, or a class of your own as "
            f"my_package.my_module:Class, got {self.policy!r}",
        )


class CoordinatorConfig(Record, frozen=True, kw_only=True):
    """Where the coordinator listens, and how long it waits."""

    client_endpoint: str = "tcp://127.0.0.1:5570"
    """ZeroMQ address for clients; port 0 picks a free one."""
    client_key_file: str | None = None
    """File that `fastserve-mega keygen` wrote; ~ is expanded. Only who has it, or its .pub, can
    connect to client_endpoint, and what is sent there is encrypted. None lets everybody in."""
    worker_endpoint: str = "tcp://127.0.0.1:0"
    """ZeroMQ address for the ranks; port 0 picks a free one, told to the ranks over MPI."""
    startup_timeout_s: TimeLimit = 600.0
    """Longest wait for all ranks to have loaded the model."""
    step_timeout_s: TimeLimit = 120.0
    """Longest wait for a dispatched step; then the workers are taken for lost."""
    client_buffer_messages: PositiveInt = 10_000
    """Unsent messages held per client; a slower reader's requests are aborted."""
    client_timeout_s: TimeLimit = 30.0
    """A client silent for this long is taken for gone and its requests are aborted."""
    drain_timeout_s: TimeLimit = 5.0
    """On SIGTERM, how long running requests may go on before they end with `error`."""
    event_log: str | None = None
    """File for everything the scheduler is told and answers, for `fastserve-mega replay`; ~ is
    expanded, an existing file is replaced. None records nothing."""


ToolParserName = Literal[
    "auto", "hermes", "llama3_json", "qwen3_coder", "mistral", "harmony", "none"
]
ReasoningParserName = Literal["auto", "think", "mistral", "harmony", "none"]
GenerationDefaults = Literal["model", "none"]


class ServerConfig(Record, frozen=True, kw_only=True):
    """The OpenAI-compatible HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of them."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """TCP port to listen on."""
    live_view: bool = True
    """Show what the scheduler is doing on a web page at /."""
    api_key_file: str | None = None
    """YAML file of keys and their limits (`fastserve-mega api-key`, docs/api.md), of which a client
    must send one as `Authorization: Bearer KEY`; ~ is expanded. It is read again when it changes.
    None asks for none. Health, metrics and the live view need no key."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may ask from a browser; `*` is all of them."""
    tool_parser: ToolParserName = "auto"
    """How the model writes tool calls; auto goes by its chat template, with none it makes only
    those that a request forces."""
    reasoning_parser: ReasoningParserName = "auto"
    """How the model marks what it thinks before it answers, which is told apart from the answer;
    auto goes by its chat template, with none all of it is the answer."""
    generation_defaults: GenerationDefaults = "model"
    """Where temperature, top_p, top_k, min_p and repetition_penalty come from that a request does
    not give: the model's generation_config.json, or none: temperature 1, all tokens."""
    max_body_bytes: PositiveInt | None = None
    """Longest body of a request; None takes 1 MiB and 64 bytes for each token of the context."""
    max_connections: PositiveInt | None = None
    """Connections at the same time; one more takes the place of one without a request, or gets 503.
    None takes what the limit of open files leaves, at most 10,000."""


class SupervisorConfig(Record, frozen=True, kw_only=True):
    """When `fastserve-mega serve` starts processes again."""

    max_restarts: Count = 50
    """So often within restart_window_s; a loss after that ends everything. Waits between attempts
    in vain grow to 30 s."""
    restart_window_s: TimeLimit = 600.0
    """Time in which restarts are counted."""
    hang_limit_s: TimeLimit = 8.0
    """A coordinator or HTTP server that has answered nothing for so long, and any process that a
    signal has stopped for so long, is killed and started again. A rank whose connection is silent
    for so long is lost, whoever has started it."""


class Config(Record, frozen=True, kw_only=True):
    """Everything a deployment says about itself; `configs/smollm2-135m-cpu.yaml` explains it."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
