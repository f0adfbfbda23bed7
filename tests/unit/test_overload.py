from __future__ import annotations

import random
from itertools import islice

import pytest
from system import overload_checks, server_processes
from system.overload_checks import Blocks, Outcome, Sample, Workload

MIB = 2**20
EMPTY = Blocks(free=5, cached=2, owned=0)
SERVER = ("worker 10", "coordinator 11")


def sample(at_s, mib, *, unfinished=0, device=EMPTY, host=EMPTY, processes=SERVER):
    resident = dict.fromkeys(processes, mib * MIB // len(processes))
    return Sample(at_s, unfinished, resident, device, host)


def wrong(outcomes, samples, counted_ends=None):
    """What does not hold after a run of 100 s."""
    findings = overload_checks.check(
        outcomes,
        samples,
        seconds=100.0,
        counted_ends=len(outcomes) if counted_ends is None else counted_ends,
        processes_before=SERVER,
        growth_limit_bytes=16 * MIB,
    )
    return [finding.what for finding in findings if not finding.holds]


GOOD = [Outcome(reason, 3, 9.0) for reason in overload_checks.REASONS]
FLAT = [sample(0, 100), sample(20, 200), sample(60, 190), sample(100, 216), sample(130, 300)]


# --- verdicts ------------------------------------------------------------------------------------


def test_a_run_as_it_should_be():
    assert wrong(GOOD, FLAT) == []


@pytest.mark.parametrize("reason", ["error", "none", overload_checks.HUNG, "ServerError: gone"])
def test_a_request_without_a_good_end(reason):
    (what,) = wrong([*GOOD, Outcome(reason, 0, 50.0)], FLAT)
    assert what == "each request ended with a good reason"


def test_an_end_too_many_or_too_few():
    for counted in (len(GOOD) - 1, len(GOOD) + 1):
        assert wrong(GOOD, FLAT, counted) == ["the server counted one end of each"]


def test_an_overload_without_rejections_was_none():
    assert wrong([Outcome("stop", 3, 9.0)], FLAT) == ["some were rejected"]


@pytest.mark.parametrize(
    ("last", "what"),
    [
        (sample(130, 200, processes=SERVER[:1]), "all processes live"),
        (sample(130, 200, unfinished=1), "nothing is unfinished"),
        (sample(130, 200, device=Blocks(6, 0, 1)), "all device blocks free or cached"),
        (sample(130, 200, host=Blocks(6, 0, 1)), "all host blocks free or cached"),
    ],
)
def test_what_is_left_at_the_end(last, what):
    assert wrong(GOOD, [*FLAT[:-1], last]) == [what]


def test_memory_may_grow_in_the_first_fifth_only():
    assert overload_checks.memory_growth(FLAT, 100.0) == 16 * MIB
    assert wrong(GOOD, [*FLAT[:3], sample(99, 217), FLAT[-1]]) == [
        "memory is flat from a fifth of the run on"
    ]
    assert overload_checks.memory_growth(FLAT[-1:], 100.0) == 0  # too short to say


# --- the workload --------------------------------------------------------------------------------

WORKLOAD = Workload(prompts=[[1, 2], [3]], prefix=[7, 8, 9], answer_lengths=[4, 16])


def draw(count, *, disturb, seed=0):
    return list(islice(WORKLOAD.draw(random.Random(seed), disturb=disturb), count))


def test_the_workload_is_a_function_of_the_seed():
    assert draw(50, disturb=True) == draw(50, disturb=True)
    assert draw(50, disturb=True) != draw(50, disturb=True, seed=1)


def test_some_share_a_prefix_some_cancel_some_time_out():
    jobs = draw(2000, disturb=True)
    assert {job.prompt for job in jobs} == {(1, 2), (3,), (7, 8, 9, 1, 2), (7, 8, 9, 3)}
    assert {job.max_tokens for job in jobs} == {4, 16}
    assert sum(job.prompt[0] == 7 for job in jobs) / 2000 == pytest.approx(1 / 3, rel=0.1)
    cancelled = [job for job in jobs if job.cancel_after_s]
    limited = [job for job in jobs if job.timeout_s]
    assert len(cancelled) / 2000 == pytest.approx(0.1, rel=0.3)
    assert len(limited) / 2000 == pytest.approx(0.1, rel=0.3)
    assert not any(job.timeout_s for job in cancelled)


def test_capacity_is_measured_undisturbed():
    assert not any(job.cancel_after_s or job.timeout_s for job in draw(200, disturb=False))


# --- what the server says ------------------------------------------------------------------------

METRICS = """# HELP fastserve_device_blocks KV blocks on the device
# TYPE fastserve_device_blocks gauge
fastserve_device_blocks{state="free"} 5.0
fastserve_device_blocks{state="cached"} 2.0
fastserve_device_blocks{state="owned"} 1.0
fastserve_request_finished_total{finish_reason="stop"} 3.0
fastserve_request_finished_total{finish_reason="abort"} 4.0
fastserve_request_finished_created{finish_reason="abort"} 1.7e+09
"""


def test_metrics_are_read():
    metrics = overload_checks.parse_metrics(METRICS)
    assert overload_checks.blocks_of(metrics, "device") == Blocks(free=5, cached=2, owned=1)
    assert overload_checks.finished_requests(metrics) == 7


# --- /proc ---------------------------------------------------------------------------------------


def process(proc, process_id, parent, *, state="S", name="python", words=(), pages=1):
    directory = proc / str(process_id)
    directory.mkdir()
    (directory / "stat").write_text(f"{process_id} ({name}) {state} {parent} 1 1")
    (directory / "comm").write_text(f"{name}\n")
    (directory / "cmdline").write_text("\0".join(words))
    (directory / "statm").write_text(f"900 {pages} 0 0")


def test_all_processes_below_one_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda _: 4096)
    (tmp_path / "meminfo").write_text("")
    process(tmp_path, 10, 1, pages=7)
    process(tmp_path, 30, 10, name="odd) name (", pages=2)
    # Ids wrap around, so a child may have the lower one.
    serve = ("python", "-m", "fastserve_mega", "worker", "--config", "x")
    process(tmp_path, 5, 30, words=serve, pages=3)
    process(tmp_path, 31, 10, state="Z")
    process(tmp_path, 40, 1)
    expected = {"worker 5": 3 * 4096, "odd) name ( 30": 2 * 4096}
    assert server_processes.resident_bytes(10, tmp_path) == expected
