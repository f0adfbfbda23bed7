"""Step times from the figures of devices, links and models."""

from __future__ import annotations

from collections.abc import Iterator

from fastserve_mega.plan import SequenceSlice
from fastserve_mega.simulator.engine_model import StepWork, step_work
from fastserve_mega.simulator.stage_cost import stage_cost
from fastserve_mega.system.config import Config
from fastserve_mega.system.deployment import DeploymentPlan
from fastserve_mega.types import RequestId


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
