"""The line that `serve` prints while it is busy."""

from fastserve_mega.launcher.supervisor import INTERVAL_S, StatsLine, describe
from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.snapshot import Percentiles, PoolView, ReplicaView, RequestView


def snapshot(clock_s, generated, *, running=0, queued=0, host=0):
    views = tuple(
        RequestView(str(number), 0, "resident", True, 5, 2, 6, 0.0) for number in range(running)
    )
    replica = ReplicaView(
        (running, queued), (), views, PoolView(25, 0, 100), PoolView(host, 0, 50),
        0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    return Snapshot(clock_s, (replica, replica), 0, generated, 0, Percentiles(), Percentiles())


def test_a_busy_server_tells_its_load():
    line = describe(snapshot(20.0, 700, running=3, queued=4), snapshot(10.0, 200))
    assert line == "6 running, 8 waiting, 50.0 tokens/s, KV 25%"
    line = describe(snapshot(20.0, 200, running=1, host=10), None)
    assert line == "2 running, 0 waiting, 200 tokens so far, KV 25%, host KV 20%"


def test_an_idle_or_restarted_one_says_nothing():
    assert describe(snapshot(20.0, 700), snapshot(10.0, 700)) is None
    assert describe(snapshot(3.0, 10, running=1), snapshot(100.0, 700)) is None


def test_it_asks_once_in_an_interval_and_survives_silence():
    answers = [snapshot(10.0, 0), None, snapshot(30.0, 100, running=1), snapshot(40.0, 150)]
    asked = []
    stats = StatsLine(lambda: asked.append(1) or answers[len(asked) - 1], now=0.0)
    lines = [stats.due(second) for second in range(int(4 * INTERVAL_S) + 1)]
    assert len(asked) == 4
    assert [line for line in lines if line] == [
        "2 running, 0 waiting, 100 tokens so far, KV 25%",
        "0 running, 0 waiting, 5.0 tokens/s, KV 25%",
    ]
