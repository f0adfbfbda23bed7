"""Ranks as threads of the test, with a list for the exchange."""

from __future__ import annotations

import logging
import threading

import msgspec
import pytest

from fastserve_mega.system.config import Config, ModelConfig, SchedulerConfig
from fastserve_mega.worker import rank_group as module
from fastserve_mega.worker.exchange import MissingRanksError
from fastserve_mega.worker.rank_group import OthersFailedError, RankGroup
from fastserve_mega.worker.topology import Topology, place_on_hosts

LIMIT_S = 60


class SharedExchange:
    """Of `size` threads."""

    uses_master_port = False

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.values = [""] * size
        self.aborted = threading.Event()

    def of(self, rank):
        exchange = self

        class Mine:
            uses_master_port = False

            def gather(self, value, limit_s):
                exchange.values[rank] = value
                try:
                    exchange.barrier.wait(limit_s)
                    answers = list(exchange.values)
                    exchange.barrier.wait(limit_s)
                except threading.BrokenBarrierError:
                    raise MissingRanksError("somebody does not come") from None
                return answers

            def abort(self):
                exchange.aborted.set()

            def close(self):
                pass

        return Mine()


def run(works):
    """Call each with the RankGroup of its rank; returns what they returned or raised."""
    shared = SharedExchange(len(works))
    outcomes = [None] * len(works)

    def target(rank, work):
        topology = Topology(rank=rank, world_size=len(works))
        try:
            outcomes[rank] = work(RankGroup(topology, shared.of(rank), LIMIT_S))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=target, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    return outcomes, shared


def config(**changes):
    return msgspec.structs.replace(Config(model=ModelConfig(path="/models/x")), **changes)


def test_values_travel_in_rank_order():
    outcomes, _ = run([lambda ranks, i=i: ranks.gather(f"value {i}") for i in range(3)])
    assert outcomes == [["value 0", "value 1", "value 2"]] * 3


def test_a_different_field_is_named():
    other = config(scheduler=SchedulerConfig(max_batch_size=3))
    works = [lambda ranks, c=c: ranks.agree(c) for c in (config(), config(), other)]
    outcomes, _ = run(works)
    assert {str(outcome) for outcome in outcomes} == {
        "ranks [2] have another scheduler.max_batch_size than rank 0"
    }


def test_the_same_configuration_is_fine_and_the_hosts_are_known():
    def work(ranks):
        ranks.agree(config())
        return ranks.topology

    outcomes, _ = run([work, work])
    assert [topology.local_rank for topology in outcomes] == [0, 1]
    assert all(topology.local_size == 2 for topology in outcomes)


def test_ranks_that_share_a_device_are_refused_whatever_replica_they_are_of():
    def work(device):
        def with_device(ranks):
            ranks.agree(config())
            ranks.share_no_device(device)

        return with_device

    assert run([work(""), work("")])[0] == [None, None]
    assert run([work("cuda:0 a"), work("cuda:0 b")])[0] == [None, None]
    outcomes, _ = run([work("cuda:0 a"), work("cuda:0 b"), work("cuda:0 a")])
    assert {str(outcome) for outcome in outcomes} == {
        "ranks [0, 2] have one device together (cuda:0 a), each needs its own"
    }


def test_places_on_hosts():
    hosts = ["a", "a", "b", "b", "b"]
    placed = place_on_hosts(Topology(rank=3, world_size=5), hosts)
    assert (placed.local_rank, placed.local_size, placed.has_several_hosts) == (1, 3, True)


def test_an_error_answers_the_call_of_the_others_and_is_said_once(caplog):
    def failing(ranks):
        ranks.fail(ValueError(f"too little by {ranks.topology.rank}"))

    def waiting(ranks):
        ranks.gather("fine")

    with caplog.at_level(logging.ERROR):
        outcomes, shared = run([waiting, failing, failing])
    assert isinstance(outcomes[0], OthersFailedError)
    assert [record.getMessage() for record in caplog.records] == ["ranks [1, 2]: too little by 1"]
    assert not shared.aborted.is_set()


def test_an_error_while_others_are_busy_ends_them(caplog, monkeypatch):
    monkeypatch.setattr(module, "_GRACE_S", 0.01)
    with caplog.at_level(logging.ERROR):
        _, shared = run([lambda ranks: None, lambda ranks: ranks.fail(OSError("no such file"))])
    assert [record.getMessage() for record in caplog.records] == ["rank 1: no such file"]
    assert shared.aborted.is_set()


@pytest.mark.parametrize(
    ("error", "text"),
    [(KeyError("x"), "KeyError: 'x'"), (OSError("y"), "y"), (MemoryError(), "MemoryError")],
)
def test_errors_say_what_they_are(caplog, error, text):
    with caplog.at_level(logging.ERROR):
        run([lambda ranks: ranks.fail(error)])
    assert [record.getMessage() for record in caplog.records] == [text]
