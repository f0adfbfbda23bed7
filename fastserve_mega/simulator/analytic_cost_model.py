"""Step times from hardware and model figures: a roofline per kind of kernel and pipeline stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fastserve_mega.plan import SequenceSlice
from fastserve_mega.system.hardware import Device, Link, Mesh, ModelShape
from fastserve_mega.types import RequestId


class StepWork(NamedTuple):
    """What the slices of one step add up to."""

    tokens: int
    sampled: int
    """Slices that yield a token."""
    decode_slices: int
    """Slices of one token."""
    decode_context: int
    """KV tokens they read."""
    prefill_context: int
    """KV tokens read by longer slices."""
    prefill_pairs: int
    """Query-key pairs of longer slices, the causal half only."""
    earlier_pairs: int = 0
    """Query-key pairs of longer slices with tokens of earlier steps."""


def step_work(batch: Iterable[SequenceSlice]) -> StepWork:
    """Add up a batch."""
    tokens = sampled = decode_slices = decode_context = prefill_context = prefill_pairs = 0
    earlier_pairs = 0
    for _, start, num_tokens, samples, _, _ in batch:
        tokens += num_tokens
        if samples:
            sampled += 1
        if num_tokens == 1:
            decode_slices += 1
            decode_context += start + 1
        else:
            prefill_context += start + num_tokens
            earlier_pairs += num_tokens * start
            prefill_pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return StepWork(
        tokens, sampled, decode_slices, decode_context, prefill_context, prefill_pairs,
        earlier_pairs,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _StageCost:
    """Coefficients of one stage, seconds each."""

    weights_s: float
    """Reading the stage's layers once."""
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

    def seconds(self, work: StepWork) -> float:
        linear_s = self.linear_s * work.tokens
        total_s = self.fixed_s + self.all_reduce_s * work.tokens
        total_s += self.weights_s if self.weights_s > linear_s else linear_s
        total_s += self.kv_read_s * work.decode_context
        if work.prefill_pairs:
            total_s += max(self.kv_read_s * work.prefill_context, self.pair_s * work.prefill_pairs)
        if work.sampled:
            total_s += max(self.head_weights_s, self.head_s * work.sampled)
        return total_s


class AnalyticCostModel:
    """Times of steps and copies, for the simulation (exact) and the scheduler (its CostModel).

    A stage's step is the sum of its kernels, each at its own roofline max(memory, compute):

    - Linear layers: their weights are read once per step; 2 FLOPs per parameter and token.
    - Attention: the KV of the context is read once per slice; 4 FLOPs per query-key pair, head and
      head dimension. Slices of one token are memory bound on every device here; longer slices are
      compared to the roofline together.
    - Output layer, on the last stage: read once, for sampled tokens only. Embedding look-ups are
      free.
    - `layer_overhead_s` per layer: the small kernels (norms, residuals, activations) and launches.
    - Tensor parallelism divides weights, KV and FLOPs by `tensor`, and adds two ring all-reduces
      per layer: latency, and 2 (t-1)/t of the activations' bytes over the link.
    - A pipeline stage sends its activations on once, scattered over its tensor ranks and gathered
      again (Megatron's scatter-gather), so that a link between nodes carries them once.
    - `step_overhead_s` per step, between its result and the next plan's start: scheduling,
      messages, sampling. It is not hidden unless other steps are in flight.

    Layers are divided as evenly as possible, the extra ones first. Ranks are equally fast.
    Activations' own memory traffic is left out: below 1 % of the weights' for these batches.
    """

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        mesh: Mesh,
        *,
        interconnect: Link,
        network: Link,
        max_batch_tokens: int,
        layer_overhead_s: float = 10e-6,
        step_overhead_s: float = 1e-3,
    ) -> None:
        """Prepare the coefficients.

        Args:
            device: each rank has one.
            model: the sizes of the model.
            mesh: how ranks divide the model.
            interconnect: between the devices of a node.
            network: between nodes.
            max_batch_tokens: longer prompts are prefilled in chunks of this many tokens.
            layer_overhead_s: fixed time of a layer in each step.
            step_overhead_s: fixed time of a step outside its stages.

        Raises:
            ValueError: the mesh cannot divide the model.
        """
        if model.num_heads % mesh.tensor:
            raise ValueError(
                f"mesh.tensor {mesh.tensor} does not divide the {model.num_heads} heads of "
                f"{model.name}"
            )
        if mesh.pipeline > model.layers:
            raise ValueError(
                f"mesh.pipeline {mesh.pipeline} exceeds the {model.layers} layers of {model.name}"
            )
        self.step_overhead_s = step_overhead_s
        self.max_batch_tokens = max_batch_tokens
        self._device = device
        self._model = model
        self._mesh = mesh
        self._links = (interconnect, network)
        self._layer_overhead_s = layer_overhead_s
        self._stages = tuple(self._stage_cost(stage) for stage in range(mesh.pipeline))
        self._hops = tuple((cost.hop_s, cost.hop_token_s) for cost in self._stages)
        self._kv_read_s = sum(cost.kv_read_s for cost in self._stages)
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

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block on the rank that holds the most layers."""
        heads = max(self._model.num_kv_heads // self._mesh.tensor, 1)
        values = 2 * self._layers(0) * heads * self._model.head_dim * block_size
        return values * self._model.bytes_per_value

    def copy_s(self, blocks: int, block_size: int) -> float:
        """Seconds to copy KV blocks between device and host; all ranks copy their shards at once.

        Blocks of one copy are gathered, so that the link's bandwidth is what counts.
        """
        bandwidth = self._device.host_bandwidth * self._device.host_efficiency
        return blocks * self.block_bytes(block_size) / bandwidth

    def device_blocks(
        self, block_size: int, memory_utilization: float, reserved_bytes: float
    ) -> int:
        """KV blocks that fit beside the weights, the null block included; smallest over ranks.

        Raises:
            ValueError: not even two blocks fit.
        """
        weights = max(self._weight_bytes(stage) for stage in range(self._mesh.pipeline))
        available = self._device.memory_bytes * memory_utilization - weights - reserved_bytes
        blocks = int(available // self.block_bytes(block_size))
        if blocks < 2:
            raise ValueError(
                f"{self._model.name} does not fit on {self._mesh.world_size} x "
                f"{self._device.name}: {weights / 1e9:.1f} GB of weights per device"
            )
        return blocks

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

    def observe(self, prefill_tokens: int, decodes: int, elapsed_s: float) -> None:
        """Nothing to learn: the simulation takes its times from here."""

    # --- coefficients ----------------------------------------------------------------------------

    def _chunks(self, tokens: int) -> Iterator[StepWork]:
        for start in range(0, tokens, self.max_batch_tokens):
            size = min(self.max_batch_tokens, tokens - start)
            is_last = start + size == tokens
            yield step_work([SequenceSlice(RequestId(""), start, size, is_last, 0, ())])

    def _layers(self, stage: int) -> int:
        quotient, extra = divmod(self._model.layers, self._mesh.pipeline)
        return quotient + (stage < extra)

    def _weight_bytes(self, stage: int) -> int:
        """Of one rank of a stage."""
        model, last = self._model, self._mesh.pipeline - 1
        values = self._layers(stage) * model.layer_parameters
        if stage == 0:
            values += model.embedding_parameters + model.learned_positions * model.hidden_size
        if stage == last and not (stage == 0 and model.tied_embeddings):
            values += model.embedding_parameters
        return values * model.bytes_per_value // self._mesh.tensor

    def _stage_cost(self, stage: int) -> _StageCost:
        model, mesh, device = self._model, self._mesh, self._device
        layers, is_last = self._layers(stage), stage == mesh.pipeline - 1
        bandwidth = device.memory_bandwidth * device.memory_efficiency * mesh.tensor
        flops = device.peak_flops * device.compute_efficiency * mesh.tensor
        parameters = layers * model.layer_parameters
        head = model.embedding_parameters if is_last else 0
        kv_bytes = model.kv_bytes_per_token * layers / model.layers
        activation = model.hidden_size * model.bytes_per_value
        link = self._links[mesh.stage_spans_nodes(stage)]
        all_reduces = 2 * layers if mesh.tensor > 1 else 0
        hop = self._links[not is_last and mesh.hop_crosses_nodes(stage)]
        return _StageCost(
            weights_s=parameters * model.bytes_per_value / bandwidth,
            linear_s=2 * parameters / flops,
            kv_read_s=kv_bytes * _kv_replicas(model, mesh) / bandwidth,
            pair_s=4 * layers * model.num_heads * model.head_dim / flops,
            head_weights_s=head * model.bytes_per_value / bandwidth,
            head_s=2 * head / flops,
            fixed_s=layers * self._layer_overhead_s + all_reduces * link.latency_s,
            all_reduce_s=all_reduces
            * (2 * (mesh.tensor - 1) / mesh.tensor)
            * activation
            / link.bandwidth,
            hop_s=0.0 if is_last else hop.latency_s,
            hop_token_s=0.0 if is_last else activation / hop.bandwidth,
        )


def _kv_replicas(model: ModelShape, mesh: Mesh) -> int:
    """Ranks that hold the same KV head, when there are more ranks than heads."""
    return math.ceil(mesh.tensor / model.num_kv_heads)
