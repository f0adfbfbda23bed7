"""Requests for the simulation: lengths from a source, arrival times drawn or from there too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import field

from fastserve_mega.records import Count, PositiveFloat, PositiveInt, Record
from fastserve_mega.simulator.lengths import LengthTable, SyntheticLengths, read_source
from fastserve_mega.system.config_file import load_yaml
from fastserve_mega.types import BlockHash

_SCALING_ROUNDS = 20
_SCALING_TOLERANCE = 0.002


class RequestSpec(NamedTuple):
    """One request of a workload."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    client: str = ""
    """Who asks; empty when the workload does not say."""
    priority: int = 0
    """As clients give it: lower is more urgent."""
    session: str = ""
    """Requests of a session begin with the same tokens, as far as the shorter one goes, answers
    included; empty shares nothing."""
    preamble: str = ""
    """All requests with this preamble begin with the same `preamble_tokens` tokens."""
    preamble_tokens: int = 0
    expected_output_tokens: int | None = None
    """What the client says of the length of the answer; None for nothing."""

    @property
    def shares_tokens(self) -> bool:
        """Whether others may begin with the same tokens."""
        return bool(self.session or self.preamble)

    def block_hash(self, block: int, block_size: int, number: int) -> BlockHash:
        """Name the content of one full block of this request.

        Args:
            block: counts the blocks of its prompt and answer from 0.
            block_size: tokens of a block.
            number: of the request, which names what it shares with nobody.
        """
        if (block + 1) * block_size <= self.preamble_tokens:
            return BlockHash(f"{self.preamble}/{block}")
        return BlockHash(f"{self.session or number}/{block}")


class WorkloadConfig(Record, frozen=True, kw_only=True):
    """Which requests, and when. Rows are filtered, scaled within the limits, then sampled."""

    source: str | SyntheticLengths = "synthetic-sharegpt"
    """synthetic-sharegpt, synthetic-alpaca, sharegpt, arxiv, azure_conv_2023, alpaca; or a CSV
    file, perhaps gzipped, with a header: prompt_tokens, output_tokens, timestamp_s for a trace, and
    perhaps client, who asks; or distributions to draw from. Rows with 0 tokens are skipped."""
    where: Mapping[str, int] = field(default_factory=dict)
    """Takes only the rows whose columns have these values, for example {turn: 0}."""
    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are left out, before and after scaling."""
    max_total_tokens: PositiveInt | None = None
    """Rows with more tokens of prompt and output together are left out in the same way."""
    mean_prompt_tokens: PositiveFloat | None = None
    """Scale the prompts so that those within the limits have this mean."""
    mean_output_tokens: PositiveFloat | None = None
    """Scale the outputs in the same way."""
    rate: PositiveFloat | None = None
    """Requests per second; rows are sampled without replacement as long as there are enough.
    None replays the timestamps of a trace."""
    cv: PositiveFloat = 1.0
    """Coefficient of variation of the times between arrivals: 1 is Poisson, else Gamma."""
    speedup: PositiveFloat = 1.0
    """The timestamps of a replayed trace are divided by this."""
    num_requests: PositiveInt = 1000
    """Measured requests; a trace may have fewer."""
    warmup_requests: Count = 0
    """Arrive before the measured ones."""
    cooldown_requests: Count = 0
    """Arrive after the measured ones and keep up the load until those have finished."""
    seed: Count = 0
    """Decides the times and the rows that are drawn."""

    def __post_init__(self) -> None:
        if self.rate is None and self.cv != 1.0:
            raise ValueError("workload.cv needs workload.rate: a trace has its own arrival times")
        if self.rate is not None and self.speedup != 1.0:
            raise ValueError("workload.speedup is for traces; set workload.rate alone")

    @property
    def total_requests(self) -> int:
        return self.warmup_requests + self.num_requests + self.cooldown_requests


class _WorkloadFile(Record, frozen=True):
    workload: WorkloadConfig


def load_workload(path: str | Path | None, overrides: Sequence[str] = ()) -> WorkloadConfig:
    """Read a workload's YAML file and apply overrides of the form `workload.field=value`.

    Args:
        path: of the file; None takes the defaults, which lack a rate.
        overrides: as of a deployment's configuration.

    Raises:
        ValueError: the file or an override is not valid; the message names which of them, and
            the field.
        OSError: the file cannot be read.
    """
    return load_yaml(path, _WorkloadFile, overrides, section="workload").workload


def make_requests(config: WorkloadConfig, directory: Path | None = None) -> list[RequestSpec]:
    """The requests of a workload, in order of arrival; the same for the same seed.

    Raises:
        ValueError: the source has no usable rows or not these columns; the message names it.
        OSError: the file cannot be read.
    """
    return draw_requests(config, load_lengths(config, directory))


def draw_requests(config: WorkloadConfig, table: LengthTable) -> list[RequestSpec]:
    """The requests of a workload, as `make_requests`, from lengths that are loaded already."""
    if config.rate is None:
        return _replay(config, table)
    return _sample(config, table, config.rate)


def load_lengths(config: WorkloadConfig, directory: Path | None = None) -> LengthTable:
    """Read, filter and scale the rows of a workload's source; see `read_source`."""
    is_trace = config.rate is None
    rows = read_source(config.source, directory, where=config.where, with_times=is_trace)
    table = _filter(config, rows)
    if not len(table.lengths):
        raise ValueError(f"{table.origin}: no row passes the filters of the workload")
    return _scale(config, table)


def _filter(config: WorkloadConfig, table: LengthTable) -> LengthTable:
    prompt, output = table.lengths.T
    keep = (prompt > 0) & (output > 0)
    if config.max_prompt_tokens is not None:
        keep &= prompt <= config.max_prompt_tokens
    if config.max_total_tokens is not None:
        keep &= prompt + output <= config.max_total_tokens
    return table.where(keep)


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
            raise ValueError(f"{table.origin}: no row is left within the limits after scaling")
    return scaled


def _replay(config: WorkloadConfig, table: LengthTable) -> list[RequestSpec]:
    if table.timestamps_s is None:
        raise ValueError(f"{table.origin}: has no timestamps")
    order = np.argsort(table.timestamps_s, kind="stable")[: config.total_requests]
    times = table.timestamps_s[order]
    return _specs((times - times[0]) / config.speedup, table, order)


def _sample(config: WorkloadConfig, table: LengthTable, rate: float) -> list[RequestSpec]:
    random = np.random.default_rng(config.seed)
    count, rows = config.total_requests, len(table.lengths)
    shuffles = [random.permutation(rows) for _ in range(-(-count // rows))]
    chosen = np.concatenate(shuffles)[:count]
    shape = 1.0 / config.cv**2
    gaps = random.gamma(shape, 1.0 / (rate * shape), size=count)
    return _specs(np.cumsum(gaps), table, chosen)


def _specs(
    times: npt.NDArray[np.float64], table: LengthTable, rows: npt.NDArray[np.int64]
) -> list[RequestSpec]:
    """Put arrival times and rows of a table together."""
    lengths = table.lengths[rows].tolist()
    clients = [""] * len(rows) if table.clients is None else table.clients[rows].tolist()
    return [
        RequestSpec(time, prompt, output, client)
        for time, (prompt, output), client in zip(times.tolist(), lengths, clients, strict=True)
    ]
