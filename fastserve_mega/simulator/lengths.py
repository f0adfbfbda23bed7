"""Where the lengths of requests come from: data that is shipped, a file, or a distribution."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from fastserve_mega.records import PositiveFloat, PositiveInt, Record

LENGTH_COLUMNS = ("prompt_tokens", "output_tokens")
TIME_COLUMN = "timestamp_s"
CLIENT_COLUMN = "client"

SHIPPED = Path(__file__).parent.parent / "data"
"""Lengths whose licences allow it; NOTICE there says whose they are."""

Lengths = npt.NDArray[np.int64]
"""Rows of (prompt tokens, output tokens)."""


class Lognormal(Record, frozen=True, kw_only=True):
    """A distribution of lengths in whole tokens, of at least one."""

    mean: PositiveFloat
    """In tokens, before rounding."""
    cv: PositiveFloat
    """Coefficient of variation: standard deviation over mean."""

    def draw(self, random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """So many lengths."""
        variance = math.log1p(self.cv**2)
        values = random.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        return np.maximum(np.rint(values), 1).astype(np.int64)

    def __str__(self) -> str:
        return f"mean {self.mean:g}, cv {self.cv:g}"


class SyntheticLengths(Record, frozen=True, kw_only=True):
    """Lengths drawn from two distributions that do not depend on each other."""

    prompt: Lognormal
    """Lengths of prompts."""
    output: Lognormal
    """Lengths of outputs."""
    rows: PositiveInt = 20_000
    """Drawn once, always the same; what a file would have."""

    def draw(self) -> Lengths:
        """Draw the rows, the same each time."""
        random = np.random.default_rng(0)
        columns = [each.draw(random, self.rows) for each in (self.prompt, self.output)]
        return np.stack(columns, axis=1)

    def __str__(self) -> str:
        return f"synthetic (lognormal; prompts: {self.prompt}; outputs: {self.output})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Lengths with a name."""

    file: str | None = None
    """In the directory of the user's data, or, with .gz, in that of the shipped data."""
    stand_in: SyntheticLengths | None = None
    """Where there is no such file."""


# The moments are those of first turns of ShareGPT conversations with prompts of at most 1,024
# tokens and at most 2,048 in all, and of all instructions of Alpaca (in SmolLM2's tokens); prompt
# and output are all but uncorrelated in both (0.01 and -0.09).
SHAREGPT_LIKE = SyntheticLengths(
    prompt=Lognormal(mean=136.8, cv=1.39), output=Lognormal(mean=468.2, cv=0.60)
)
ALPACA_LIKE = SyntheticLengths(
    prompt=Lognormal(mean=18.2, cv=0.77), output=Lognormal(mean=57.0, cv=1.0)
)
DATASETS = {
    "synthetic-sharegpt": Dataset(stand_in=SHAREGPT_LIKE),
    "synthetic-alpaca": Dataset(stand_in=ALPACA_LIKE),
    "sharegpt": Dataset(file="sharegpt_8k_lengths.csv"),
    "arxiv": Dataset(file="arxiv_summarization_4k_lengths.csv"),
    "azure_conv_2023": Dataset(file="azure_conv_2023.csv"),
    # Its licence is not for all uses (CC-BY-NC-4.0), so it is not shipped.
    "alpaca": Dataset(file="alpaca_lengths.csv", stand_in=ALPACA_LIKE),
}


@dataclass(frozen=True, slots=True)
class LengthTable:
    """The lengths a workload draws from."""

    lengths: Lengths
    timestamps_s: npt.NDArray[np.float64] | None
    """Ascending, None when the source has none or they are not asked for."""
    origin: str
    """What they are, for titles."""
    is_synthetic: bool = False
    clients: npt.NDArray[np.str_] | None = None
    """The client, row by row; None when the source does not say."""

    @property
    def means(self) -> tuple[float, float]:
        """Mean prompt and output tokens."""
        prompt, output = self.lengths.mean(axis=0)
        return float(prompt), float(output)

    def where(self, keep: npt.NDArray[np.bool_]) -> LengthTable:
        """Only some of the rows."""
        times, clients = self.timestamps_s, self.clients
        return replace(
            self,
            lengths=self.lengths[keep],
            timestamps_s=None if times is None else times[keep],
            clients=None if clients is None else clients[keep],
        )


def read_source(
    source: str | SyntheticLengths,
    directory: Path | None,
    *,
    where: Mapping[str, int],
    with_times: bool,
) -> LengthTable:
    """All rows of a source.

    Args:
        source: a name of `DATASETS`, a path, or distributions.
        directory: of the user's data: paths are relative to it, and its files are taken in place
            of shipped ones and stand-ins.
        where: columns and their values; other rows are left out.
        with_times: whether the source has to have arrival times too.

    Raises:
        ValueError: there are no such columns, or what they hold are no lengths.
        OSError: the file cannot be read.
    """
    if isinstance(source, SyntheticLengths):
        return _draw(source, str(source), where, with_times=with_times)
    dataset = DATASETS.get(source)
    if dataset is None:
        path = (directory or Path()) / source
        return _read(path, source, where=where, with_times=with_times)
    if (found := _file_of(dataset, directory)) is not None:
        return _read(found, source, where=where, with_times=with_times)
    if dataset.stand_in is None:
        raise ValueError(f"{source}: {dataset.file}.gz is not in {SHIPPED}")
    name = f"{source}: {dataset.stand_in}"
    if dataset.file:
        name += f", since there is no {dataset.file} (--data)"
    return _draw(dataset.stand_in, name, where, with_times=with_times)


def _file_of(dataset: Dataset, directory: Path | None) -> Path | None:
    if dataset.file is None:
        return None
    places = [directory / dataset.file] if directory else []
    places.append(SHIPPED / f"{dataset.file}.gz")
    return next((path for path in places if path.is_file()), None)


def _draw(
    source: SyntheticLengths, name: str, where: Mapping[str, int], *, with_times: bool
) -> LengthTable:
    for column in where:
        raise ValueError(f"{name}: has no column {column!r}")
    if with_times:
        raise ValueError(f"{name}: has no arrival times of its own: give workload.rate or --rates")
    return LengthTable(source.draw(), None, name, is_synthetic=True)


def _read(path: Path, name: str, *, where: Mapping[str, int], with_times: bool) -> LengthTable:
    needed = [*LENGTH_COLUMNS, *where, *([TIME_COLUMN] if with_times else [])]
    wanted = list(where.values())
    numbers: list[list[float]] = []
    clients: list[str] = []
    with _open(path) as file:
        rows = csv.DictReader(file, restval="")
        for column in needed:
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"{path}: has no column {column!r}")
        for row in rows:
            values = [_number(row[column], column, path, rows.line_num) for column in needed]
            if values[2 : 2 + len(wanted)] == wanted:
                numbers.append(values)
                clients.append(row.get(CLIENT_COLUMN, ""))
    table = np.array(numbers, dtype=np.float64).reshape(-1, len(needed))
    return LengthTable(
        table[:, :2].astype(np.int64),
        table[:, -1] if with_times else None,
        name,
        clients=np.array(clients, dtype=np.str_) if any(clients) else None,
    )


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _number(text: str, column: str, path: Path, line: int) -> float:
    try:
        value = float(text) if column == TIME_COLUMN else int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**40:
        raise ValueError(
            f"{path}, line {line}: {column} must be a number that is not negative, got {text!r}"
        )
    return value
