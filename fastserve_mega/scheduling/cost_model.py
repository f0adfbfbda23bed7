"""How long a step takes: measured once, then refined from the steps that ran."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from fastserve_mega.records import Record


class CostModel(Protocol):
    """Predicts step times in seconds."""

    def prefill_s(self, tokens: int) -> float:
        """Time to prefill a prompt of `tokens` alone."""

    def decode_s(self, batch: int, context: int) -> float:
        """Time of one decode step of `batch` requests of `context` tokens each."""

    def observe(self, prefill_tokens: int, decodes: int, context: int, elapsed_s: float) -> None:
        """Learn from a step that ran.

        Args:
            prefill_tokens: of all its prefills.
            decodes: requests that decoded beside them.
            context: tokens of each of these, on average.
            elapsed_s: what the step took.
        """


class PrefillPoint(Record, frozen=True):
    """One measurement of a prefill."""

    tokens: int
    seconds: float


class DecodePoint(Record, frozen=True):
    """One measurement of a decode step."""

    batch: int
    context: int
    seconds: float


class MixedPoint(Record, frozen=True):
    """One measurement of a step as they are in practice."""

    prefill_tokens: int
    """Tokens of one prompt that is prefilled beside the decodes; 0 for decodes only."""
    contexts: tuple[int, ...]
    """Tokens of each decoding request."""
    seconds: float


class ChunkPoint(Record, frozen=True):
    """One measurement of a later chunk of a long prompt."""

    start: int
    """Tokens of the prompt that were prefilled before."""
    tokens: int
    seconds: float


class FirstPoint(Record, frozen=True):
    """What the first step of a size took longer than the second."""

    tokens: int
    """Tokens of all requests of the step."""
    extra_s: float


class Profile(Record, frozen=True):
    """What `fastserve-mega profile` measures; stored as JSON."""

    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    mixed: tuple[MixedPoint, ...] = ()
    """This and what follows is for simulations; the scheduler asks for steps of one kind only."""
    chunks: tuple[ChunkPoint, ...] = ()
    first: tuple[FirstPoint, ...] = ()
    """A CPU's matrix products are compiled for each number of rows when it first occurs."""
    pipelined: Profile | None = None
    """What the same steps take with one in each pipeline stage: seconds from result to result. All
    other times are from dispatch to result of a step alone. None with one stage."""

    def __post_init__(self) -> None:
        if not self.prefill or not self.decode:
            raise ValueError("a profile needs at least one prefill and one decode measurement")
        seconds = [point.seconds for point in self.prefill]
        seconds += [point.seconds for point in self.decode]
        seconds += [point.seconds for point in self.mixed]
        seconds += [point.seconds for point in self.chunks]
        if min(seconds) <= 0:
            raise ValueError("the times of a profile must be positive")
        lengths = [point.tokens for point in self.prefill]
        shapes = [(point.batch, point.context) for point in self.decode]
        if min(lengths) < 1 or any(batch < 1 or context < 0 for batch, context in shapes):
            raise ValueError("the sizes of a profile must be positive")
        if any(not p.contexts or min(p.contexts) < 0 or p.prefill_tokens < 0 for p in self.mixed):
            raise ValueError("a mixed step of a profile has decodes, and no negative sizes")
        if any(p.start < 1 or p.tokens < 1 for p in self.chunks):
            raise ValueError("a later chunk of a profile has tokens, and tokens before it")
        if any(p.tokens < 1 or p.extra_s < 0 for p in self.first):
            raise ValueError("the first steps of a profile have tokens, and no negative times")
        if len(set(lengths)) < len(lengths) or len(set(shapes)) < len(shapes):
            raise ValueError("a profile must not have two measurements of the same size")


class ProfiledCostModel:
    """Interpolates a profile, and scales it by what the steps that ran took.

    Prefill is piecewise linear in the prompt length. Decode is piecewise linear in the batch, and
    within a batch in the context where the profile has several. Beyond the profile the last slope
    goes on. Two factors, one for decode steps and one for steps with prefill, follow the observed
    times as exponential averages; a step that took ten times its prediction (a paused machine)
    moves them no more than one that took twice as long.
    """

    SMOOTHING = 0.02
    MAX_STEP_RATIO = 2.0

    def __init__(self, profile: Profile) -> None:
        self._prefill = sorted((point.tokens, point.seconds) for point in profile.prefill)
        self._decode = _decode_lines(profile.decode)
        self._prefill_scale = 1.0
        self._decode_scale = 1.0

    def prefill_s(self, tokens: int) -> float:
        return self._prefill_scale * interpolate(self._prefill, tokens)

    def decode_s(self, batch: int, context: int) -> float:
        return self._decode_scale * self._unscaled_decode_s(batch, context)

    def observe(self, prefill_tokens: int, decodes: int, context: int, elapsed_s: float) -> None:
        if elapsed_s <= 0:
            return
        if prefill_tokens:
            # Its tokens pass through the layers like those of a prompt; what the contexts of the
            # decodes cost comes on top of it.
            predicted = interpolate(self._prefill, prefill_tokens + decodes)
            predicted += self._context_s(decodes, context) if decodes else 0.0
            self._prefill_scale = self._follow(self._prefill_scale, elapsed_s / predicted)
        elif decodes:
            predicted = self._unscaled_decode_s(decodes, context)
            self._decode_scale = self._follow(self._decode_scale, elapsed_s / predicted)

    def _unscaled_decode_s(self, batch: int, context: int) -> float:
        by_batch = [(size, interpolate(line, context)) for size, line in self._decode]
        return interpolate(by_batch, batch)

    def _context_s(self, batch: int, context: int) -> float:
        """What a decode step takes longer at this context than at none."""
        at_none = self._unscaled_decode_s(batch, 0)
        return max(self._unscaled_decode_s(batch, context) - at_none, 0.0)

    def _follow(self, scale: float, ratio: float) -> float:
        bounded = min(max(ratio, scale / self.MAX_STEP_RATIO), scale * self.MAX_STEP_RATIO)
        return scale + self.SMOOTHING * (bounded - scale)


def _decode_lines(points: Sequence[DecodePoint]) -> list[tuple[int, list[tuple[int, float]]]]:
    """Per batch size, ascending: (context, seconds) ascending."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        lines.setdefault(point.batch, []).append((point.context, point.seconds))
    return [(batch, sorted(lines[batch])) for batch in sorted(lines)]


def interpolate(points: Sequence[tuple[int, float]], x: int) -> float:
    """Piecewise linear in x through `points`, which ascend in it.

    Beyond the ends the nearest slope goes on, but never below the smallest measured value.
    """
    if len(points) == 1:
        return points[0][1]
    index = min(max(bisect_left(points, (x, 0.0)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), min(y0, y1, points[0][1]))
