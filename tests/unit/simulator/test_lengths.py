"""Shipped lengths, stand-ins, and distributions."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from fastserve_mega.simulator import lengths
from fastserve_mega.simulator.lengths import (
    ALPACA_LIKE,
    SHAREGPT_LIKE,
    SHIPPED,
    Lognormal,
    SyntheticLengths,
    read_source,
)
from fastserve_mega.simulator.workload import WorkloadConfig, load_lengths, load_workload


@pytest.mark.parametrize(
    ("source", "where", "rows", "means"),
    [
        ("sharegpt", {"turn": 0}, 5678, (228.4, 471.3)),
        ("arxiv", {}, 28_257, (2588.1, 291.4)),
        ("azure_conv_2023", {}, 19_366, (1154.7, 211.1)),
    ],
)
def test_shipped_lengths_are_those_of_their_sources(source, where, rows, means) -> None:
    table = read_source(source, None, where=where, with_times=False)
    assert len(table.lengths) == rows
    assert table.means == pytest.approx(means, abs=0.1)
    assert not table.is_synthetic


def test_the_shipped_trace_has_its_times() -> None:
    table = read_source("azure_conv_2023", None, where={}, with_times=True)
    assert table.timestamps_s is not None
    assert len(table.timestamps_s) / table.timestamps_s[-1] == pytest.approx(5.53, abs=0.01)


def test_every_shipped_file_is_in_the_notice() -> None:
    notice = (SHIPPED / "NOTICE").read_text(encoding="utf-8")
    files = {path.name for path in SHIPPED.glob("*.csv.gz")}
    assert files == {f"{each.file}.gz" for each in lengths.DATASETS.values() if each.file} - {
        "alpaca_lengths.csv.gz"
    }
    assert all(name in notice for name in files)


@pytest.mark.parametrize("source", [SHAREGPT_LIKE, ALPACA_LIKE])
def test_a_distribution_has_the_moments_it_states(source: SyntheticLengths) -> None:
    for column, wanted in zip(source.draw().T, (source.prompt, source.output), strict=True):
        assert column.min() >= 1
        assert column.mean() == pytest.approx(wanted.mean, rel=0.03)
        assert column.std() / column.mean() == pytest.approx(wanted.cv, rel=0.06)
    assert np.array_equal(source.draw(), source.draw())


def test_alpaca_is_the_file_where_there_is_one_and_else_a_stand_in(tmp_path: Path) -> None:
    stand_in = read_source("alpaca", tmp_path, where={}, with_times=False)
    assert stand_in.is_synthetic
    assert "no alpaca_lengths.csv (--data)" in stand_in.origin
    (tmp_path / "alpaca_lengths.csv").write_text("prompt_tokens,output_tokens\n7,43\n")
    real = read_source("alpaca", tmp_path, where={}, with_times=False)
    assert (real.lengths.tolist(), real.is_synthetic, real.origin) == ([[7, 43]], False, "alpaca")


def test_a_file_of_ones_own_is_taken_before_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "sharegpt_8k_lengths.csv").write_text("prompt_tokens,output_tokens\n1,2\n")
    table = read_source("sharegpt", tmp_path, where={}, with_times=False)
    assert table.lengths.tolist() == [[1, 2]]


def test_a_path_may_be_gzipped(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "w.csv.gz", "wt") as file:
        file.write("prompt_tokens,output_tokens\n3,4\n")
    config = WorkloadConfig(source="w.csv.gz", rate=1.0)
    assert load_lengths(config, tmp_path).lengths.tolist() == [[3, 4]]


def test_distributions_need_a_rate_and_have_no_columns() -> None:
    with pytest.raises(ValueError, match="has no arrival times of its own: give workload"):
        load_lengths(WorkloadConfig())
    with pytest.raises(ValueError, match="has no column 'turn'"):
        load_lengths(WorkloadConfig(rate=1.0, where={"turn": 0}))


def test_distributions_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("source: {prompt: {mean: 9, cv: 1}, output: {mean: 5, cv: 0.5}, rows: 10}")
    config = load_workload(path, ["workload.rate=2"])
    assert config.source == SyntheticLengths(
        prompt=Lognormal(mean=9, cv=1), output=Lognormal(mean=5, cv=0.5), rows=10
    )
    assert config.rate == 2
    with pytest.raises(ValueError, match=r"unknown field 'workload\.source\.prompt\.median'"):
        load_workload(path, ["workload.source.prompt.median=3"])
