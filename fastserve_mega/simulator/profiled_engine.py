"""An engine that takes as long as a profile says: the simulation of a machine that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from fastserve_mega.scheduling.cost_model import MixedPoint, Profile, ProfiledCostModel
from fastserve_mega.simulator.analytic_cost_model import StepWork


class ProfiledEngine:
    """Step times of mixed batches from a profile.

    A step of one kind is as measured. All tokens of a mixed step go through the linear layers
    together, so it costs what a prefill of as many tokens does, and its decodes beyond that what
    a decode step costs more than a prefill of one token per request: reading their KV.

    The profile's mixed steps, if it has any, correct two things: how much longer a decode step of
    requests of all ages takes than one of equal requests (a CPU pads their contexts to each
    other), and what it costs that a step has both kinds.

    Left out: what a chunk reads of the KV of the chunks before it.

    The profile measures a step through all stages, dispatch and result included. Stages share it
    by their layers, hops and overhead with it.
    """

    step_overhead_s = 0.0

    def __init__(
        self, profile: Profile, layers_per_stage: Sequence[int], copy_block_s: float = 0.0
    ) -> None:
        """Prepare.

        Args:
            profile: measured on the engine, with the same number of stages.
            layers_per_stage: of each stage.
            copy_block_s: seconds to copy one KV block between device and host.
        """
        self._costs = ProfiledCostModel(profile)  # never told of a step: stays as measured
        self._spread = 1.0
        """Time of a decode step of several requests over that of equal ones."""
        self._mixing_s = 0.0
        self._spread = _median_of(1.0, (p.seconds / self._mixed_s(p) for p in _decodes(profile)))
        self._mixing_s = _median_of(0.0, (p.seconds - self._mixed_s(p) for p in _both(profile)))
        layers = sum(layers_per_stage)
        self._shares = tuple(count / layers for count in layers_per_stage)
        self._no_hops = (0.0,) * len(layers_per_stage)
        self._copy_block_s = copy_block_s

    def step_s(self, work: StepWork) -> float:
        """Seconds from dispatch to result of a step alone on the ranks."""
        decodes = work.decode_slices
        context = work.decode_context / decodes - 1 if decodes else 0.0
        return self._seconds(work.tokens - decodes, decodes, round(context))

    def _seconds(self, prefill_tokens: int, decodes: int, context: int) -> float:
        prefill_s = self._costs.prefill_s
        if not decodes:
            return prefill_s(prefill_tokens)
        decode_s = self._costs.decode_s(decodes, context)
        if decodes > 1:
            decode_s *= self._spread
        if not prefill_tokens:
            return decode_s
        kv_s = max(decode_s - prefill_s(decodes), 0.0)
        return max(prefill_s(prefill_tokens + decodes) + kv_s + self._mixing_s, decode_s)

    def _mixed_s(self, point: MixedPoint) -> float:
        decodes = len(point.contexts)
        return self._seconds(point.prefill_tokens, decodes, round(sum(point.contexts) / decodes))

    def stage_times(self, work: StepWork) -> Sequence[float]:
        step_s = self.step_s(work)
        return [share * step_s for share in self._shares]

    def hop_times(self, tokens: int) -> Sequence[float]:
        """Part of the stages' times."""
        return self._no_hops

    def copy_s(self, blocks: int, block_size: int) -> float:
        return blocks * self._copy_block_s


def _decodes(profile: Profile) -> Iterator[MixedPoint]:
    return (p for p in profile.mixed if not p.prefill_tokens and len(p.contexts) > 1)


def _both(profile: Profile) -> Iterator[MixedPoint]:
    return (p for p in profile.mixed if p.prefill_tokens)


def _median_of(otherwise: float, values: Iterable[float]) -> float:
    return median(found) if (found := list(values)) else otherwise
