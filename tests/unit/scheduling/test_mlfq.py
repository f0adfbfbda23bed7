"""The queue discipline of section 4.1 of the paper, by example."""

from fixed_costs import Driver, arrived, make_scheduler, names

from fastserve_mega.scheduling.events import StepDone


def level_of(scheduler, name):
    return scheduler._requests[name].queue.level


def test_a_request_joins_the_highest_level_whose_quantum_holds_its_prefill():
    scheduler = make_scheduler()  # quanta 1, 2, 4, 8, 16, 32 s; prefill 0.1 s per token
    prompts = {"a": 1, "b": 10, "c": 11, "d": 20, "e": 21, "f": 160, "g": 9999}
    scheduler.step(0.0, [arrived(name, length) for name, length in prompts.items()])
    levels = [level_of(scheduler, name) for name in prompts]
    assert levels == [0, 0, 1, 1, 2, 4, 5]


def test_prompts_do_not_all_join_the_top_level():
    scheduler = make_scheduler()
    scheduler.step(0.0, [arrived(f"r{i}", 10 * 2**i) for i in range(6)])
    assert scheduler.level_lengths() == (1, 1, 1, 1, 1, 1)


def test_naive_mlfq_lets_all_join_at_the_top():
    scheduler = make_scheduler(policy="mlfq")
    scheduler.step(0.0, [arrived("short", 1), arrived("long", 9999)])
    assert scheduler.level_lengths()[0] == 2


def test_a_used_up_quantum_demotes_to_the_next_level():
    scheduler = make_scheduler()
    plan = scheduler.step(0.0, [arrived("a", 10)])
    scheduler.step(1.0, [StepDone(plan.step_id, 1.0)])
    assert level_of(scheduler, "a") == 1


def test_an_unfinished_quantum_does_not():
    scheduler = make_scheduler()
    plan = scheduler.step(0.0, [arrived("a", 5)])
    scheduler.step(0.5, [StepDone(plan.step_id, 0.5)])
    assert level_of(scheduler, "a") == 0


def test_demotion_skips_levels_that_could_not_hold_the_next_iteration():
    scheduler = make_scheduler(policy="skip_join_mlfq", base_quantum_s=0.25)  # 0.25, 0.5, 1, 2, ...
    plan = scheduler.step(0.0, [arrived("a", 2)])
    assert level_of(scheduler, "a") == 0
    scheduler.step(0.25, [StepDone(plan.step_id, 0.25)])
    assert level_of(scheduler, "a") == 2  # a decode takes 1 s, so not in Q2


def test_a_prefill_in_chunks_is_one_iteration_and_is_not_demoted_within():
    scheduler = make_scheduler(max_batch_tokens=100)
    driver = Driver(scheduler, {"long": 5})
    driver.step([arrived("long", 300)])
    # Promoted by hand: the first chunk of 10 s uses the quantum of Q1 up ten times.
    scheduler._policy.queues.move(scheduler._requests["long"], 0)
    driver.step()
    driver.step()
    assert level_of(scheduler, "long") == 0
    driver.step()  # the prompt is read: what it used up counts now
    assert level_of(scheduler, "long") == 1


def test_half_read_prompts_do_not_take_turns():
    """Each would hold the blocks of its whole prompt while the others run."""
    scheduler = make_scheduler(max_batch_tokens=100, levels=1)  # a quantum of 1 s
    driver = Driver(scheduler, dict.fromkeys("abc", 1))
    driver.step([arrived(name, 300) for name in "abc"])  # 30 s each, in chunks of 10 s
    driver.run_until_idle()
    assert [names(plan)[0] for plan in driver.plans] == [*"aaabbbccc"]
    assert driver.finished_at == {"a": 30.0, "b": 60.0, "c": 90.0}


def test_who_is_overdue_but_cannot_be_promoted_is_not_expected_before_the_promoted():
    scheduler = make_scheduler(max_batch_size=1, starvation_limit_s=3.0)
    scheduler.step(0.0, [arrived("short", 10), *(arrived(f"l{i}", 320) for i in range(3))])
    scheduler.step(9.0, [StepDone(0, 3.0, ("short",))])  # all are overdue by 6 s, one is promoted
    assert [level_of(scheduler, f"l{i}") for i in range(3)] == [0, 5, 5]
    policy, requests = scheduler._policy, scheduler._requests
    assert policy.enst(9.0)(requests["l0"]) == 0.0
    # T_execute of the lowest level: l0 comes down from Q1 first, 1 + 2 + 4 + 8 + 16 s.
    assert policy.enst(9.0)(requests["l1"]) == 31.0


def test_a_promotion_that_is_overdue_is_expected_at_once_and_not_in_the_past():
    scheduler = make_scheduler(max_batch_size=2, window=1, starvation_limit_s=3.0)
    scheduler.step(0.0, [arrived("a", 10), arrived("b", 10), arrived("late", 320)])
    assert scheduler._policy.enst(8.0)(scheduler._requests["late"]) == 0.0


def test_the_lowest_level_is_round_robin():
    scheduler = make_scheduler(levels=1, max_batch_size=1)
    driver = Driver(scheduler, {"a": 3, "b": 3})
    driver.step([arrived("a", 5), arrived("b", 5)])
    driver.run_until_idle()
    order = [names(plan)[0] for plan in driver.plans]
    assert order == ["a", "a", "b", "b", "a", "b"]  # prefill 0.5 s, decode 1 s, quantum 1 s


def test_order_within_a_level_is_first_in_first_out():
    scheduler = make_scheduler(max_batch_size=2, levels=3)
    driver = Driver(scheduler, dict.fromkeys("abcd", 4))
    driver.step([arrived(name, 20) for name in "abcd"])  # all join level 1, quantum 2 s
    driver.run_until_idle()
    order = ["".join(names(plan)) for plan in driver.plans]
    assert order[:3] == ["ab", "cd", "ab"]


def test_a_request_with_quantum_left_keeps_its_place():
    scheduler = make_scheduler(max_batch_size=1)
    driver = Driver(scheduler, {"a": 5, "b": 5})
    driver.step([arrived("a", 15), arrived("b", 15)])  # level 1, quantum 2 s, prefill 1.5 s
    assert names(driver.step()) == ["a"]


def test_promotion_by_deadline():
    scheduler = make_scheduler(max_batch_size=1, starvation_limit_s=3.0)
    driver = Driver(scheduler, {"long": 2, **{f"s{i}": 1 for i in range(50)}})
    driver.step([arrived("long", 320), arrived("s0", 10)])
    assert names(driver.plans[-1]) == ["s0"]
    for i in range(1, 50):
        driver.step([arrived(f"s{i}", 10), arrived(f"t{i}", 10)])
        driver._left[f"t{i}"] = 1
        if "long" in names(driver.plans[-1]):
            break
    # Promoted at 3 s behind those already in Q1: the 6 short ones that had arrived by then.
    waited_s = driver.now
    assert waited_s <= 3.0 + 7.0


def test_a_request_that_never_ran_waits_from_its_arrival():
    scheduler = make_scheduler(max_batch_size=1, starvation_limit_s=3.0)
    scheduler.step(100.0, [arrived("short", 10), arrived("long", 320)])
    assert level_of(scheduler, "long") == 5
    assert scheduler._policy.next_deadline(100.0) == 103.0


def test_the_deadline_is_known_not_searched():
    scheduler = make_scheduler(max_batch_size=1, starvation_limit_s=3.0)
    scheduler.step(0.0, [arrived("short", 10), *(arrived(f"l{i}", 320) for i in range(5))])
    scheduler.step(1.0, [arrived("later", 320)])
    assert scheduler._policy.next_deadline(1.0) == 3.0
    assert scheduler.next_deadline(1.0) is None  # no step can be planned before that one is done
    assert scheduler.level_lengths()[5] == 6
    plan = scheduler.step(3.0, [StepDone(0, 3.0, ("short",))])
    assert names(plan) == ["l0"]
    assert scheduler.level_lengths()[0] == 1  # a batch of the five
    assert scheduler._policy.next_deadline(3.0) == 3.0  # that one has KV now: the next may come
    plan = scheduler.step(35.0, [StepDone(1, 32.0)])
    assert names(plan) == ["l1"]


def test_the_starving_with_kv_leave_room_in_the_highest_level_for_those_without():
    scheduler = make_scheduler(max_batch_size=1, starvation_limit_s=3.0)
    scheduler.step(0.0, [arrived("begun", 320)])
    new = [arrived(f"new{i}", 160) for i in range(2)]
    scheduler.step(40.0, [StepDone(0, 32.0), arrived("short", 10), *new])
    assert all(level_of(scheduler, name) > 0 for name in ("begun", "new0", "new1"))
    scheduler.step(44.0, [StepDone(1, 1.0, ("short",))])
    assert level_of(scheduler, "begun") == 0
    assert level_of(scheduler, "new0") == 0
    assert level_of(scheduler, "new1") > 0


def test_priority_shifts_the_level_and_stays_within_the_queue():
    scheduler = make_scheduler()
    scheduler.step(
        0.0,
        [
            arrived("normal", 20),
            arrived("sooner", 20, priority=-1),
            arrived("soonest", 20, priority=-99),
            arrived("later", 20, priority=2),
            arrived("latest", 20, priority=99),
        ],
    )
    assert scheduler.level_lengths() == (2, 1, 0, 1, 0, 1)


def test_patience_lets_short_prompts_pass_long_ones_that_have_waited_for_the_limit():
    """Prompts of 8 s and 4 s wait behind one of 10 s; all have waited for the limit of 1 s."""
    orders = {}
    for patience in (0.0, 3.0):
        scheduler = make_scheduler(
            max_batch_size=1, starvation_limit_s=1.0, prefill_patience=patience
        )
        driver = Driver(scheduler, {"first": 1, "long": 1, "short": 1})
        driver.step([arrived("first", 100)])
        scheduler.step(0.0, [arrived("long", 80), arrived("short", 40)])
        driver.run_until_idle()
        orders[patience] = list(driver.finished_at)
    # With patience they starve after 1 + 24 and 1 + 12 s.
    assert orders == {0.0: ["first", "long", "short"], 3.0: ["first", "short", "long"]}


def test_patience_is_for_those_without_kv():
    scheduler = make_scheduler(max_batch_size=1, starvation_limit_s=5.0, prefill_patience=100.0)
    scheduler.step(0.0, [arrived("a", 20)])
    scheduler.step(2.0, [StepDone(0, 2.0), arrived("b", 10)])
    assert level_of(scheduler, "a") == 2
    assert scheduler._policy.next_deadline(2.0) == 7.0


def test_work_in_the_background_is_promoted_later_and_falls_back_to_its_own_level():
    """Priority 2 waits four times the limit, and nobody for ever."""
    scheduler = make_scheduler(max_batch_size=1, starvation_limit_s=3.0, base_quantum_s=1.0)
    driver = Driver(scheduler, {"background": 3, **{f"urgent{i}": 1 for i in range(60)}})
    driver.step([arrived("background", 10, priority=2), arrived("urgent0", 10)])
    for i in range(1, 60):
        driver.step([arrived(f"urgent{i}", 10)])
    (first, second, third) = [
        number for number, plan in enumerate(driver.plans) if names(plan) == ["background"]
    ][:3]
    assert first >= 12
    assert second - first >= 12
    assert third - second >= 12
    assert third < 60
