"""What a rank sends is not always what it should send."""

from __future__ import annotations

import pytest
import zmq

from fastserve_mega.coordinator.worker_group import WorkersLostError, ZmqWorkers
from fastserve_mega.messaging.frames import encode
from fastserve_mega.messaging.rank_messages import WorkerReady
from fastserve_mega.worker.loop import connect_to_coordinator

WAIT_S = 20.0


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"\x01\x40\x80", "rank-0: this end speaks protocol version 2, got a message of version 1"),
        (b"\x02\xc1", "rank-0: not a message: "),
        (encode(WorkerReady(-1, 1, 0, 1)), "rank-0: WorkerReady: rank must be at least 0, got -1"),
    ],
)
def test_a_frame_that_cannot_be_read_names_its_rank(frame, reason):
    context = zmq.Context()
    workers = ZmqWorkers(context, "tcp://127.0.0.1:0", replicas=1, ranks_per_replica=1)
    rank = connect_to_coordinator(context, workers.endpoint, 0)
    try:
        rank.send(frame)
        assert workers.wait(WAIT_S)
        with pytest.raises(WorkersLostError) as caught:
            workers.receive()
        assert str(caught.value).startswith(reason)
    finally:
        rank.close()
        workers.close()
        context.term()
