"""The demo's tables, at the widths terminals have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rendering import WIDTHS, assert_fits, assert_says, rendered

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import demo
from demo import Job, Outcome

from fastserve_mega.system.config import Config
from fastserve_mega.system.config_file import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2-135m-cpu.yaml"


def job(name, ttft_s, jct_s):
    return Job(name, "Why?", 16, ttft_s=ttft_s, jct_s=jct_s, text="Because of reasons. " * 20)


def outcome(ttft_s, short_s, long_s):
    short = [job(f"short {number}", ttft_s, short_s + number) for number in range(3)]
    long = [job(f"long {number}", 0.125, long_s + number) for number in range(2)]
    return Outcome(long, short, 1234, 567)


MLFQ, FCFS = outcome(1.11, 22.22, 5555.5), outcome(33.33, 4444.4, 666.6)


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_figure_of_the_running_requests_is_lost(width, terminal):
    jobs = [*MLFQ.long, *FCFS.short, Job("short 9", "Why?", 16)]
    text = rendered(
        lambda console: console.print(demo.table("fcfs", jobs, console.width)),
        width,
        terminal=terminal,
    )
    figures = [demo.seconds(value) for job in jobs for value in (job.ttft_s, job.jct_s)]
    headings = "scheduler.policy: fcfs request first s done s text as it streams"
    assert_says(text, [headings, *(job.name for job in jobs), *figures])
    assert text.count("Because") >= len(jobs) - 1  # the one without text has none yet
    assert_fits(text, width)


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_figure_of_the_summary_is_lost(width, terminal):
    view = demo.summary([MLFQ, FCFS])
    text = rendered(lambda console: console.print(view), width, terminal=terminal)
    figures = "1.11 33.33 23.22 4445.40 24.22 4446.40 0.12 0.12 5556.00 667.10 5556.50 667.60"
    assert_says(text, ["skip_join_mlfq fcfs", figures, "1234 567 1234 567"])
    assert_fits(text, width)


def test_the_verdict_names_the_gain_and_its_price():
    gain, price = demo.verdict([MLFQ, FCFS])
    assert "finish 191.4 times sooner" in gain
    assert "after 23.2 s instead of 4445.4 s" in gain
    assert "after 5556.0 s instead of 667.1 s" in price


def test_places_and_memory_hold_some_of_the_long_answers_and_not_all():
    """Else nothing would queue, and nothing would have to move."""
    config: Config = load_config(CONFIG, demo.SCARCE)
    prompt_tokens = 45  # with the chat template
    blocks = -(-(prompt_tokens + demo.LONG_TOKENS) // config.kv_cache.block_size)
    places = config.scheduler.max_batch_size * config.parallel.pipeline
    usable = config.kv_cache.device_blocks - 1
    assert places < len(demo.LONG)
    assert places * blocks <= usable < len(demo.LONG) * blocks
