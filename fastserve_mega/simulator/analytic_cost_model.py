"""Step times from the figures of devices, links and models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.plan import SequenceSlice
from fastserve_mega.simulator.engine_model import StepWork, step_work
from fastserve_mega.system.config import Config
from fastserve_mega.system.deployment import DeploymentPlan
from fastserve_mega.system.hardware import Device, Link
from fastserve_mega.system.sizes import kv_head_bytes
from fastserve_mega.types import RequestId


@dataclass(frozen=True, slots=True)
class StageCost:
    """Coefficients of one stage, seconds each unless said otherwise."""

    weights_s: float
    """Reading the stage's layers once, their experts not counted."""
    linear_s: float
    """Matrix products of one token."""
    kv_read_s: float
    """Reading the KV of one token."""
    pair_s: float
    """Attention of one query-key pair."""
    head_weights_s: float
    """Reading the output layer once; 0 but for the last stage."""
    head_s: float
    """Output layer of one sampled token; 0 but for the last stage."""
    fixed_s: float
    """Launches, and the latency of the all-reduces."""
    all_reduce_s: float
    """Bandwidth term of the all-reduces of one token."""
    hop_s: float
    """Latency of sending to the next stage."""
    hop_token_s: float
    """Bandwidth term of sending one token to the next stage."""
    experts_s: float = 0.0
    """Reading all experts of the stage once; 0 without experts."""
    passed_over: float = 0.0
    """Share of the experts of a layer that one token does not choose; no seconds."""

    def seconds(self, work: StepWork) -> float:
        """How long the stage is busy with a step."""
        linear_s = self.linear_s * work.tokens
        weights_s = self.weights_s
        if self.experts_s:
            weights_s += self.experts_s * (1.0 - self.passed_over**work.tokens)
        total_s = self.fixed_s + self.all_reduce_s * work.tokens
        total_s += weights_s if weights_s > linear_s else linear_s
        total_s += self.kv_read_s * work.decode_context
        if work.prefill_pairs:
            total_s += max(self.kv_read_s * work.prefill_context, self.pair_s * work.prefill_pairs)
        if work.sampled:
            total_s += max(self.head_weights_s, self.head_s * work.sampled)
        return total_s


@dataclass(frozen=True, slots=True)
class _Matrices:
    """Parameters of the layers of a stage, each counted once.

    Norms and biases are left out: below 0.1 %.
    """

    shared: int
    """What every token is multiplied with: attention, plain feed-forward layers, routers."""
    experts: int
    """The experts of all its layers together."""
    chosen: int
    """Experts that one token is multiplied with."""


def stage_cost(
    config: Config, plan: DeploymentPlan, device: Device, stage: int, replica: int
) -> StageCost:
    """The coefficients of one stage of one replica; its ranks are equally fast."""
    architecture, layers = plan.architecture, plan.stages[stage].layers
    tensor = config.parallel.tensor
    is_last = stage == len(plan.stages) - 1
    bandwidth = device.memory_bandwidth * device.memory_efficiency * tensor
    flops = device.peak_flops * device.compute_efficiency * tensor
    matrices = _matrices(architecture, layers)
    head = architecture.vocab_size * architecture.hidden_size if is_last else 0
    kv_bytes = 2 * len(layers) * architecture.num_kv_heads
    kv_bytes *= kv_head_bytes(architecture, config.kv_cache, plan.value_bytes)
    activation = architecture.hidden_size * plan.value_bytes
    link, hop = _links(config, plan, stage, replica)
    all_reduces = 2 * len(layers) if tensor > 1 else 0
    experts = architecture.experts
    return StageCost(
        weights_s=matrices.shared * plan.value_bytes / bandwidth,
        linear_s=2 * (matrices.shared + matrices.chosen) / flops,
        kv_read_s=kv_bytes * _kv_replicas(architecture, tensor) / bandwidth,
        pair_s=4 * len(layers) * architecture.num_heads * architecture.head_dim / flops,
        head_weights_s=head * plan.value_bytes / bandwidth,
        head_s=2 * head / flops,
        fixed_s=len(layers) * config.hardware.layer_overhead_s + all_reduces * link.latency_s,
        all_reduce_s=all_reduces * (2 * (tensor - 1) / tensor) * activation / link.bandwidth,
        hop_s=0.0 if is_last else hop.latency_s,
        hop_token_s=0.0 if is_last else activation / hop.bandwidth,
        experts_s=matrices.experts * plan.value_bytes / bandwidth,
        passed_over=1.0 - experts.chosen / experts.count if experts else 0.0,
    )


def _matrices(architecture: Architecture, layers: range) -> _Matrices:
    hidden, experts = architecture.hidden_size, architecture.experts
    heads = architecture.num_heads + architecture.num_kv_heads
    attention = 2 * hidden * architecture.head_dim * heads
    feed_forward = (3 if architecture.gated else 2) * hidden * architecture.ffn_hidden_size
    mixtures = sum(architecture.has_experts(layer) for layer in layers)
    shared = len(layers) * attention + (len(layers) - mixtures) * feed_forward
    if experts is None:
        return _Matrices(shared, 0, 0)
    always = hidden * experts.count + 3 * hidden * (experts.shared_ffn_hidden_size or 0)
    one = 3 * hidden * experts.ffn_hidden_size
    return _Matrices(
        shared + mixtures * always, mixtures * experts.count * one, mixtures * experts.chosen * one
    )


def _links(config: Config, plan: DeploymentPlan, stage: int, replica: int) -> tuple[Link, Link]:
    """Over which a stage's all-reduces go, and over which its activations leave it."""
    hardware = config.hardware
    links = (hardware.interconnect_figures, hardware.network_figures)
    ranks = plan.stages[stage].ranks[replica]
    next_rank = min(ranks.stop, plan.stages[-1].ranks[replica].stop - 1)
    return (
        links[hardware.spans_nodes(ranks.start, ranks.stop - 1)],
        links[hardware.spans_nodes(ranks.start, next_rank)],
    )


def _kv_replicas(architecture: Architecture, tensor: int) -> int:
    """Ranks that hold the same KV head, when there are more ranks than heads."""
    return math.ceil(tensor / architecture.num_kv_heads)


class AnalyticCostModel:
    """Times of steps and copies, for the simulation (exact) and the scheduler (its CostModel).

    A stage's step is the sum of its kernels, each at its own roofline max(memory, compute):

    - Linear layers: their weights are read once per step; 2 FLOPs per parameter and token.
    - Experts: of a layer's experts those are read that a token of the step chose, as many as
      there are on average when each is chosen as often; the ranks share them evenly.
    - Attention: the KV of the context is read once per slice; 4 FLOPs per query-key pair, head and
      head dimension. Slices of one token are memory bound on every device here; longer slices are
      compared to the roofline together. Windows of attention are not modelled.
    - Output layer, on the last stage: read once, for sampled tokens only. Embedding look-ups are
      free.
    - `hardware.layer_overhead_s` per layer: the small kernels (norms, residuals, activations) and
      launches.
    - Tensor parallelism divides weights, KV and FLOPs by `tensor`, and adds two ring all-reduces
      per layer: latency, and 2 (t-1)/t of the activations' bytes over the link.
    - A pipeline stage sends its activations on once, scattered over its tensor ranks and gathered
      again (Megatron's scatter-gather), so that a link between nodes carries them once.
    - `hardware.step_overhead_s` per step, between its result and the next plan's start:
      scheduling, messages, sampling. It is not hidden unless other steps are in flight.

    Ranks are equally fast. Activations' own memory traffic is left out: below 1 % of the weights'
    for these batches.
    """

    def __init__(self, config: Config, plan: DeploymentPlan, replica: int = 0) -> None:
        """Prepare the coefficients.

        Args:
            config: the deployment.
            plan: what goes where in it.
            replica: which copy of the model; its ranks may lie on nodes in another way.

        Raises:
            ValueError: nothing says what the devices can do.
        """
        device = config.hardware.device_figures
        if device is None:
            raise ValueError(
                "hardware.device is not given, so nothing says how long a step takes: name a "
                "device, or give a profile of the ranks"
            )
        self.step_overhead_s = config.hardware.step_overhead_s
        self.max_batch_tokens = config.scheduler.max_batch_tokens
        self._stages = tuple(
            stage_cost(config, plan, device, stage, replica) for stage in range(len(plan.stages))
        )
        self._hops = tuple((cost.hop_s, cost.hop_token_s) for cost in self._stages)
        self._kv_read_s = sum(cost.kv_read_s for cost in self._stages)
        self._copy_token_bytes = plan.rank_kv_bytes_per_token
        self._copy_bandwidth = device.host_bandwidth * device.host_efficiency
        self._prefill_s: dict[int, float] = {}
        self._decode_s: dict[int, float] = {}
        """By batch, without reading KV: srpt asks for each running request after each step."""

    # --- the simulation's view -------------------------------------------------------------------

    def stage_times(self, work: StepWork) -> list[float]:
        """Seconds each stage is busy with a step."""
        return [stage.seconds(work) for stage in self._stages]

    def hop_times(self, tokens: int) -> list[float]:
        """Seconds from the end of each stage to the next one's start; 0 after the last."""
        return [fixed_s + token_s * tokens for fixed_s, token_s in self._hops]

    def step_s(self, work: StepWork) -> float:
        """Seconds from dispatch to result of a step alone on the mesh."""
        stages_s = sum(stage.seconds(work) for stage in self._stages)
        return stages_s + sum(self.hop_times(work.tokens)) + self.step_overhead_s

    def copy_s(self, blocks: int, block_size: int) -> float:
        """Seconds to copy KV blocks between device and host; all ranks copy their shards at once.

        Blocks of one copy are gathered, so that the link's bandwidth is what counts.
        """
        return blocks * (self._copy_token_bytes * block_size) / self._copy_bandwidth

    # --- the scheduler's view: CostModel ---------------------------------------------------------

    def prefill_s(self, tokens: int) -> float:
        """Prefill of a prompt alone, chunk after chunk."""
        seconds = self._prefill_s.get(tokens)
        if seconds is None:
            seconds = self._prefill_s[tokens] = sum(map(self.step_s, self._chunks(tokens)))
        return seconds

    def decode_s(self, batch: int, context: int) -> float:
        """One decode step of `batch` requests of `context` tokens each."""
        seconds = self._decode_s.get(batch)
        if seconds is None:
            work = StepWork(batch, batch, batch, 0, 0, 0)
            seconds = self._decode_s[batch] = self.step_s(work)
        return seconds + self._kv_read_s * batch * (context + 1)

    def observe(self, prefill_tokens: int, decodes: int, context: int, elapsed_s: float) -> None:
        """Nothing to learn: the simulation takes its times from here."""

    def _chunks(self, tokens: int) -> Iterator[StepWork]:
        for start in range(0, tokens, self.max_batch_tokens):
            size = min(self.max_batch_tokens, tokens - start)
            is_last = start + size == tokens
            yield step_work([SequenceSlice(RequestId(""), start, size, is_last, 0, ())])
