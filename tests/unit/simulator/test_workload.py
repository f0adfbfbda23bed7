from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve_mega.simulator.workload import (
    RequestSpec,
    WorkloadConfig,
    load_lengths,
    load_workload,
    make_requests,
)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> Path:
        (tmp_path / "w.csv").write_text(text, encoding="utf-8")
        return tmp_path

    return write_file


TRACE = "timestamp_s,prompt_tokens,output_tokens\n5.0,10,3\n7.5,20,4\n6.0,9000,5\n"


def test_a_trace_keeps_its_arrival_times_from_its_first_row(write: Any) -> None:
    requests = make_requests(WorkloadConfig(source="w.csv"), write(TRACE))
    assert requests == [
        RequestSpec(0.0, 10, 3), RequestSpec(1.0, 9000, 5), RequestSpec(2.5, 20, 4),
    ]  # fmt: skip


def test_a_trace_can_be_filtered_cut_and_sped_up(write: Any) -> None:
    config = WorkloadConfig(source="w.csv", max_prompt_tokens=100, speedup=2.5)
    assert make_requests(config, write(TRACE)) == [
        RequestSpec(0.0, 10, 3),
        RequestSpec(1.0, 20, 4),
    ]
    config = WorkloadConfig(source="w.csv", num_requests=1)
    assert make_requests(config, write(TRACE)) == [RequestSpec(0.0, 10, 3)]


LENGTHS = "prompt_tokens,output_tokens,turn\n" + "".join(
    f"{10 + i % 7},{20 + i % 11},{i % 2}\n" for i in range(400)
)


def test_arrivals_have_the_rate_and_variation_asked_for(write: Any) -> None:
    directory = write(LENGTHS)
    for cv in (1.0, 3.0):
        config = WorkloadConfig(source="w.csv", rate=4.0, cv=cv, num_requests=20_000)
        gaps = np.diff([request.arrival_s for request in make_requests(config, directory)])
        assert gaps.mean() == pytest.approx(0.25, rel=0.06)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_rows_are_drawn_without_replacement_and_by_seed(write: Any) -> None:
    directory = write(LENGTHS)
    draws = [
        make_requests(
            WorkloadConfig(source="w.csv", rate=1.0, num_requests=400, seed=seed), directory
        )
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    lengths = [sorted(request[1:3] for request in draw) for draw in draws]
    assert lengths[0] == lengths[2] == sorted((10 + i % 7, 20 + i % 11) for i in range(400))


def test_where_takes_a_subset_and_scaling_reaches_the_means(write: Any) -> None:
    config = WorkloadConfig(
        source="w.csv", rate=1.0, where={"turn": 1}, mean_prompt_tokens=130, mean_output_tokens=100
    )
    table = load_lengths(config, write(LENGTHS))
    assert len(table.lengths) == 200
    assert table.means == (pytest.approx(130, rel=0.01), pytest.approx(100, rel=0.01))


def test_limits_hold_after_scaling_and_empty_rows_are_skipped(write: Any) -> None:
    text = "prompt_tokens,output_tokens\n10,10\n30,10\n0,5\n5,0\n900,900\n"
    config = WorkloadConfig(source="w.csv", rate=1.0, max_total_tokens=50, mean_prompt_tokens=40)
    assert load_lengths(config, write(text)).lengths.tolist() == [[40, 10]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt_tokens\n1\n", "has no column 'output_tokens'"),
        ("prompt_tokens,output_tokens\n1,2\n3,four\n", "line 3: output_tokens must be a number"),
        ("prompt_tokens,output_tokens\n1\n", "line 2: output_tokens must be a number .* got ''"),
        ("prompt_tokens,output_tokens\n-1,2\n", "line 2: prompt_tokens must be a number"),
        ("prompt_tokens,output_tokens\n0,2\n", "no row passes the filters"),
        ("", "has no column 'prompt_tokens'"),
    ],
)
def test_a_bad_file_is_one_clear_error(write: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_requests(WorkloadConfig(source="w.csv", rate=1.0), write(text))


def test_a_trace_without_timestamps_is_refused(write: Any) -> None:
    with pytest.raises(ValueError, match="has no column 'timestamp_s'"):
        make_requests(WorkloadConfig(source="w.csv"), write(LENGTHS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cv": 2.0}, "workload.cv needs workload.rate"),
        ({"rate": 1.0, "speedup": 2.0}, "workload.speedup is for traces"),
        ({"rate": 0.0}, "workload.rate must be above 0, got 0.0"),
        ({"rate": ".nan"}, "workload.rate must be above 0, got nan"),
        ({"num_requests": 0}, "workload.num_requests must be at least 1, got 0"),
        ({"seed": -1}, "workload.seed must be at least 0, got -1"),
        ({"where": "{turn: first}"}, "Expected `int`, got `str`"),
        ({"where": "{1: 2}"}, "Expected `str`, got `int` - at `workload.where`"),
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    overrides = [f"workload.{name}={value}" for name, value in options.items()]
    with pytest.raises(ValueError, match=re.escape(f"--set {overrides[-1]}: {message}")):
        load_workload(None, overrides)


def test_clients_come_from_a_column_of_their_own(write: Any) -> None:
    directory = write("prompt_tokens,output_tokens,client\n5,3,ann\n0,4,bob\n7,5,bob\n")
    config = WorkloadConfig(source="w.csv", rate=1.0, num_requests=2)
    requests = make_requests(config, directory)
    assert {(each.prompt_tokens, each.client) for each in requests} == {(5, "ann"), (7, "bob")}
