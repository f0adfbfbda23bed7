"""Requests for the simulation: lengths from a file, arrival times drawn or from the file too."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_LENGTH_COLUMNS = ("prompt_tokens", "output_tokens")
_TIME_COLUMN = "timestamp_s"

_SCALING_ROUNDS = 20
_SCALING_TOLERANCE = 0.002

Lengths = npt.NDArray[np.int64]
"""Rows of (prompt tokens, output tokens)."""


class RequestSpec(NamedTuple):
    """One request of a workload."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """Which requests, and when. Rows are filtered, scaled within the limits, then sampled."""

    path: str
    """CSV file with a header: prompt_tokens, output_tokens, and timestamp_s for a trace. Rows
    with 0 tokens are skipped."""
    where: Mapping[str, int] = field(default_factory=dict)
    """Takes only the rows whose columns have these values, for example {turn: 0}."""
    max_prompt_tokens: int | None = None
    max_total_tokens: int | None = None
    """Longer rows are left out, before and after scaling."""
    mean_prompt_tokens: float | None = None
    mean_output_tokens: float | None = None
    """Scale the lengths so that what is within the limits has these means."""
    rate: float | None = None
    """Requests per second; rows are sampled without replacement as long as there are enough.
    None replays the file's own timestamps."""
    cv: float = 1.0
    """Coefficient of variation of the times between arrivals: 1 is Poisson, else Gamma."""
    speedup: float = 1.0
    """The timestamps of a replayed trace are divided by this."""
    num_requests: int = 1000
    """Measured requests; a trace may have fewer."""
    warmup_requests: int = 0
    """Arrive before the measured ones."""
    cooldown_requests: int = 0
    """Arrive after the measured ones and keep up the load until those have finished."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate is None and self.cv != 1.0:
            raise ValueError("workload.cv needs workload.rate: a trace has its own arrival times")
        if self.rate is not None and self.speedup != 1.0:
            raise ValueError("workload.speedup is for traces; set workload.rate alone")
        for name in ("rate", "cv", "speedup", "num_requests", "max_prompt_tokens",
                     "max_total_tokens", "mean_prompt_tokens", "mean_output_tokens"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"workload.{name} must be positive, got {value}")
        for name in ("warmup_requests", "cooldown_requests", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"workload.{name} must not be negative, got {getattr(self, name)}")

    @property
    def total_requests(self) -> int:
        return self.warmup_requests + self.num_requests + self.cooldown_requests


@dataclass(frozen=True, slots=True)
class LengthTable:
    """The rows of a workload file that passed the filters."""

    lengths: Lengths
    timestamps_s: npt.NDArray[np.float64] | None
    """Ascending, None when the file has none."""

    @property
    def means(self) -> tuple[float, float]:
        """Of prompt and output tokens."""
        prompt, output = self.lengths.mean(axis=0)
        return float(prompt), float(output)


def make_requests(config: WorkloadConfig, directory: Path = Path()) -> list[RequestSpec]:
    """The requests of a workload, in order of arrival; the same for the same seed.

    Raises:
        ValueError: the file has no usable rows or not these columns; the message names it.
        OSError: the file cannot be read.
    """
    return draw_requests(config, load_lengths(config, directory))


def draw_requests(config: WorkloadConfig, table: LengthTable) -> list[RequestSpec]:
    """Like `make_requests`, from a file read before."""
    if config.rate is None:
        return _replay(config, table)
    return _sample(config, table, config.rate)


def load_lengths(config: WorkloadConfig, directory: Path = Path()) -> LengthTable:
    """Read, filter and scale the rows of `config.path`, relative to `directory`."""
    path = directory / config.path
    table = _filter(config, _read(path, config))
    if not len(table.lengths):
        raise ValueError(f"{path}: no row passes the filters of the workload")
    return _scale(config, table)


def _read(path: Path, config: WorkloadConfig) -> LengthTable:
    is_trace = config.rate is None
    needed = [*_LENGTH_COLUMNS, *config.where, *([_TIME_COLUMN] if is_trace else [])]
    wanted = list(config.where.values())
    numbers: list[list[float]] = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, restval="")
        for column in needed:
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"{path}: has no column {column!r}")
        for row in rows:
            values = [_number(row[column], column, path, rows.line_num) for column in needed]
            if values[2 : 2 + len(wanted)] == wanted:
                numbers.append(values)
    table = np.array(numbers, dtype=np.float64).reshape(-1, len(needed))
    return LengthTable(table[:, :2].astype(np.int64), table[:, -1] if is_trace else None)


def _number(text: str, column: str, path: Path, line: int) -> float:
    try:
        value = float(text) if column == _TIME_COLUMN else int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**40:
        raise ValueError(
            f"{path}, line {line}: {column} must be a number that is not negative, got {text!r}"
        )
    return value


def _filter(config: WorkloadConfig, table: LengthTable) -> LengthTable:
    prompt, output = table.lengths.T
    keep = (prompt > 0) & (output > 0)
    if config.max_prompt_tokens is not None:
        keep &= prompt <= config.max_prompt_tokens
    if config.max_total_tokens is not None:
        keep &= prompt + output <= config.max_total_tokens
    times = table.timestamps_s
    return LengthTable(table.lengths[keep], None if times is None else times[keep])


def _scale(config: WorkloadConfig, table: LengthTable) -> LengthTable:
    """Reach the means wanted with what the limits leave; long rows that outgrow them are lost."""
    wanted = (config.mean_prompt_tokens, config.mean_output_tokens)
    factors = np.ones(2)
    scaled = table
    for _ in range(_SCALING_ROUNDS):
        errors = np.array(
            [
                1.0 if mean is None else mean / actual
                for mean, actual in zip(wanted, scaled.means, strict=True)
            ]
        )
        if np.all(np.abs(errors - 1.0) < _SCALING_TOLERANCE):
            break
        factors *= errors
        lengths = np.maximum(np.rint(table.lengths * factors).astype(np.int64), 1)
        scaled = _filter(config, replace(table, lengths=lengths))
        if not len(scaled.lengths):
            raise ValueError(f"{config.path}: no row is left within the limits after scaling")
    return scaled


def _replay(config: WorkloadConfig, table: LengthTable) -> list[RequestSpec]:
    if table.timestamps_s is None:
        raise ValueError(f"{config.path}: has no timestamps")
    order = np.argsort(table.timestamps_s, kind="stable")[: config.total_requests]
    times = table.timestamps_s[order]
    return _specs((times - times[0]) / config.speedup, table.lengths[order])


def _sample(config: WorkloadConfig, table: LengthTable, rate: float) -> list[RequestSpec]:
    random = np.random.default_rng(config.seed)
    count, rows = config.total_requests, len(table.lengths)
    shuffles = [random.permutation(rows) for _ in range(-(-count // rows))]
    chosen = np.concatenate(shuffles)[:count]
    shape = 1.0 / config.cv**2
    gaps = random.gamma(shape, 1.0 / (rate * shape), size=count)
    return _specs(np.cumsum(gaps), table.lengths[chosen])


def _specs(times: npt.NDArray[np.float64], lengths: Lengths) -> list[RequestSpec]:
    return [
        RequestSpec(time, prompt, output)
        for time, (prompt, output) in zip(times.tolist(), lengths.tolist(), strict=True)
    ]
