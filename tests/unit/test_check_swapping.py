from __future__ import annotations

from pathlib import Path

from system import check_swapping
from system.check_swapping import Case, Returns

from fastserve_mega.plan import Plan, SequenceSlice
from fastserve_mega.system.config_file import load_config


def plan(step_id, *slices):
    return Plan(step_id, tuple(SequenceSlice(*piece) for piece in slices))


def test_returns_are_read_from_the_plans():
    plans = [
        plan(0, ("a", 0, 10, True, 0, (1,)), ("b", 0, 16, False, 0, (2, 3))),
        plan(1, ("a", 10, 1, True, 1, ()), ("b", 16, 4, True, 2, ())),
        plan(2, ("a", 11, 1, True, 0, (4,))),  # came back with its KV
        plan(3, ("a", 0, 13, True, 0, (4,)), ("b", 20, 1, True, 0, (5, 6))),
        plan(4, ("a", 13, 4, True, 1, (7,))),  # its table grew
        plan(5, ("b", 16, 6, True, 0, (5, 8))),  # its first block was cached
        plan(6, ("c", 0, 1, True, 0, (1,))),
    ]
    assert check_swapping.count_returns(plans) == {
        "a": Returns(with_kv=1, recomputed=1),
        "b": Returns(with_kv=1, recomputed=1),
        "c": Returns(),
    }


def test_least_and_mean():
    assert check_swapping.least_and_mean([4, 1, 3]) == "1 / 2.7"
    assert check_swapping.least_and_mean([]) == "-"


def test_a_case_is_a_configuration():
    config = Path(__file__).parents[2] / check_swapping.CONFIG
    for prefix_cache in (True, False):
        case = Case("reactive", 1, 50, prefix_cache)
        cache = load_config(config, check_swapping.settings_of(case)).kv_cache
        assert (cache.device_blocks, cache.swap.strategy) == (50, "reactive")
        assert cache.prefix_cache is prefix_cache
