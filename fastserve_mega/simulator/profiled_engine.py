"""An engine that takes as long as a profile says: the simulation of a machine that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from fastserve_mega.scheduling.cost_model import (
    ChunkPoint,
    FirstPoint,
    MixedPoint,
    Profile,
    ProfiledCostModel,
    interpolate,
)
from fastserve_mega.simulator.engine_model import StepWork

_NEAREST_FIRSTS = 5


class ProfiledEngine:
    """Step times of one run on the machine of a profile.

    A step of a number of tokens that has not occurred before takes longer, once.

    Stages share what a step takes alone by their layers, hops and overhead with it. When the
    profile also has the interval of results with a step in every stage, the slowest stage takes
    that, whatever the reason (the last stage has the output layer; stages on one machine share its
    memory), and the others share the rest.
    """

    step_overhead_s = 0.0

    def __init__(
        self, profile: Profile, layers_per_stage: Sequence[int], copy_block_s: float = 0.0
    ) -> None:
        """Prepare a run.

        Args:
            profile: measured on the engine, with the same number of stages.
            layers_per_stage: of each stage.
            copy_block_s: seconds to copy one KV block between device and host.
        """
        self._alone = StepTimes(profile)
        self._pipelined = StepTimes(profile.pipelined) if profile.pipelined else None
        self._first = profile.first
        self._seen: set[int] = set()
        layers = sum(layers_per_stage)
        self._shares = tuple(count / layers for count in layers_per_stage)
        # Of equals the last, which has the output layer.
        self._slowest = max(range(len(layers_per_stage)), key=lambda i: (layers_per_stage[i], i))
        self._no_hops = (0.0,) * len(layers_per_stage)
        self._copy_block_s = copy_block_s

    def step_s(self, work: StepWork) -> float:
        """Seconds from dispatch to result of a step alone on the ranks, not the first of a size."""
        return self._alone.seconds(work)

    def stage_times(self, work: StepWork) -> Sequence[float]:
        step_s = self.step_s(work)
        if self._pipelined is None:
            times = [share * step_s for share in self._shares]
        else:
            times = self._beside_others(step_s, self._pipelined.seconds(work))
        if work.tokens in self._seen or not self._first:
            return times
        self._seen.add(work.tokens)
        extra_s = _first_extra_s(self._first, work.tokens)
        return [
            stage_s + share * extra_s for stage_s, share in zip(times, self._shares, strict=True)
        ]

    def _beside_others(self, step_s: float, interval_s: float) -> list[float]:
        slowest, shares = self._slowest, self._shares
        rest_s = max(step_s - interval_s, 0.0) / max(1.0 - shares[slowest], 1e-9)
        # No other stage takes longer than the slowest.
        times = [min(share * rest_s, interval_s) for share in shares]
        times[slowest] = interval_s
        return times

    def hop_times(self, tokens: int) -> Sequence[float]:
        """Part of the stages' times."""
        return self._no_hops

    def copy_s(self, blocks: int, block_size: int) -> float:
        return blocks * self._copy_block_s


class StepTimes:
    """Times of mixed batches, made of the profile's times of simple ones.

    All tokens of a mixed step go through the linear layers together, so it costs what a prefill of
    as many tokens does, and its decodes beyond that what a decode step costs more than a prefill of
    one token per request: reading their KV.

    Three things are taken from steps that the profile has for it: how much longer a decode step of
    requests of all ages takes than one of equal requests (a CPU pads their contexts to each other;
    the longer they are, the more that is),
    what it costs that a step has both kinds, and what a chunk pays for each token of its prompt
    that was prefilled before.
    """

    def __init__(self, profile: Profile) -> None:
        self._costs = ProfiledCostModel(profile)  # never told of a step: stays as measured
        self._earlier = self._earlier_lines(profile.chunks)
        self._spread: list[tuple[int, float]] = []
        """Mean context, and the time of a decode step of several requests over that of equal ones;
        ascending."""
        self._mixing_s = 0.0
        self._spread = self._spread_line(profile)
        self._mixing_s = _median_of(0.0, (p.seconds - self._mixed_s(p) for p in _both(profile)))

    def seconds(self, work: StepWork) -> float:
        """Time of a step that is no longer new."""
        decodes = work.decode_slices
        prefill_tokens = work.tokens - decodes
        context = work.decode_context / decodes - 1 if decodes else 0.0
        seconds = self._mixed_seconds(prefill_tokens, decodes, round(context))
        if work.earlier_pairs:
            earlier = work.prefill_context - prefill_tokens
            seconds += earlier * self._earlier_token_s(work.earlier_pairs / earlier)
        return seconds

    def _mixed_seconds(self, prefill_tokens: int, decodes: int, context: int) -> float:
        prefill_s = self._costs.prefill_s
        if not decodes:
            return prefill_s(prefill_tokens)
        decode_s = self._costs.decode_s(decodes, context)
        if decodes > 1:
            decode_s *= self._spread_at(context)
        if not prefill_tokens:
            return decode_s
        kv_s = max(decode_s - prefill_s(decodes), 0.0)
        return max(prefill_s(prefill_tokens + decodes) + kv_s + self._mixing_s, decode_s)

    def _mixed_s(self, point: MixedPoint) -> float:
        decodes = len(point.contexts)
        return self._mixed_seconds(point.prefill_tokens, decodes, _mean_context(point))

    def _spread_line(self, profile: Profile) -> list[tuple[int, float]]:
        by_context: dict[int, list[float]] = {}
        for point in _decodes(profile):
            ratios = by_context.setdefault(_mean_context(point), [])
            ratios.append(point.seconds / self._mixed_s(point))
        return [(context, median(by_context[context])) for context in sorted(by_context)]

    def _spread_at(self, context: int) -> float:
        if not self._spread:
            return 1.0
        known = [context for context, _ in self._spread]
        return interpolate(self._spread, min(max(context, known[0]), known[-1]))

    def _earlier_lines(self, points: Iterable[ChunkPoint]) -> list[tuple[int, float]]:
        """(tokens of a chunk, seconds for each earlier token), ascending."""
        found: dict[int, list[float]] = {}
        for point in points:
            extra_s = point.seconds - self._costs.prefill_s(point.tokens)
            found.setdefault(point.tokens, []).append(extra_s / point.start)
        return [(tokens, median(found[tokens])) for tokens in sorted(found)]

    def _earlier_token_s(self, chunk_tokens: float) -> float:
        if not self._earlier:
            return 0.0
        return max(interpolate(self._earlier, round(chunk_tokens)), 0.0)


def _first_extra_s(points: Sequence[FirstPoint], tokens: int) -> float:
    """The median of the measurements nearest in size."""
    nearest = sorted(points, key=lambda point: abs(point.tokens - tokens))[:_NEAREST_FIRSTS]
    return median(point.extra_s for point in nearest)


def _decodes(profile: Profile) -> Iterator[MixedPoint]:
    return (p for p in profile.mixed if not p.prefill_tokens and len(p.contexts) > 1)


def _both(profile: Profile) -> Iterator[MixedPoint]:
    return (p for p in profile.mixed if p.prefill_tokens)


def _median_of(otherwise: float, values: Iterable[float]) -> float:
    return median(found) if (found := list(values)) else otherwise


def _mean_context(point: MixedPoint) -> int:
    return round(sum(point.contexts) / len(point.contexts))
