"""A policy that is not part of the package, named by its path in the configuration."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from fixed_costs import Driver, arrived, make_scheduler, names

from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Request

DOCUMENT = Path(__file__).parents[3] / "docs" / "scheduling.md"


class LongestPromptFirst(Policy):
    """The least that a policy can be."""

    key_changes = False

    def key(self, request: Request) -> tuple[int, int]:
        return -request.num_prompt_tokens, request.arrival_number


class NoOrder(Policy):
    """A policy that forgot its key."""


NOT_A_POLICY = 3


@pytest.fixture
def documented(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "my_policies.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_policies:LeastServedFirst"
    sys.modules.pop("my_policies", None)


def test_a_key_is_enough():
    scheduler = make_scheduler(policy=f"{__name__}:LongestPromptFirst", max_batch_size=1)
    driver = Driver(scheduler, {"short": 1, "long": 1})
    driver.step([arrived("short", 5), arrived("long", 50)])
    driver.run_until_idle()
    assert [names(plan)[0] for plan in driver.plans] == ["long", "short"]


def test_the_documented_policy_serves_who_was_served_least(documented):
    scheduler = make_scheduler(policy=documented, max_batch_size=1)
    driver = Driver(scheduler, {"a": 6, "b": 2})
    driver.step([arrived("a", 70)])
    driver.step([arrived("b", 10)])
    assert names(driver.plans[-1]) == ["b"]
    driver.run_until_idle()
    assert list(driver.finished_at) == ["b", "a"]


def test_the_documented_policy_lets_nobody_wait_for_ever(documented):
    scheduler = make_scheduler(policy=documented, max_batch_size=1)
    outputs = {"long": 3, **{f"s{i}": 1 for i in range(40)}}
    driver = Driver(scheduler, outputs)
    driver.step([arrived("long", 70)])
    for i in range(40):  # a newcomer in each step, each served less than the long one
        driver.step([arrived(f"s{i}", 10)])
    assert driver.finished_at["long"] < 20.0


def test_the_documented_policy_forgets_what_has_finished(documented):
    scheduler = make_scheduler(policy=documented, max_batch_size=2, device_blocks=40)
    driver = Driver(scheduler, {f"r{i}": 1 + i % 5 for i in range(50)})
    driver.step([arrived(f"r{i}", 1 + 7 * (i % 9)) for i in range(50)])
    driver.run_until_idle()
    driver.step()
    scheduler._policy.promote(driver.now + 100.0)
    assert not scheduler._policy._overdue
    assert scheduler.next_deadline(driver.now) is None


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        ("no_such_module:Policy", "cannot be loaded: No module named 'no_such_module'"),
        (f"{__name__}:Missing", "cannot be loaded: .* has no attribute 'Missing'"),
        (f"{__name__}:NOT_A_POLICY", "is not a subclass of fastserve_mega.scheduling"),
        (f"{__name__}:NoOrder", "defines no key"),
        ("lifo", "must be one of paced, .*, got 'lifo'"),
        ("a b:C", "my_package.my_module:Class, got 'a b:C'"),
    ],
)
def test_what_is_no_policy_is_said_in_one_sentence(policy, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_scheduler(policy=policy)
