"""What a queued request takes, and what is left when it has gone, counted in bytes."""

from __future__ import annotations

import gc
import tracemalloc

from test_coordinator_turn import World

from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.intake import HeapTrimmer
from fastserve_mega.messaging.frames import decode, encode
from fastserve_mega.messaging.messages import Cancel, Submit
from fastserve_mega.scheduling.request import BlockHashes
from fastserve_mega.system.config import SchedulerConfig
from fastserve_mega.types import SamplingParams

REQUESTS, TOKENS = 50, 1_600
BYTES_OF_A_TOKEN, BYTES_OF_A_REQUEST = 6, 4_000
"""4 of its number and 2 of its block's hash; and what does not depend on the prompt."""


def counted() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_a_queue_takes_what_is_promised_and_leaves_nothing():
    world = World(SchedulerConfig(policy="paced"), max_wait_s=float("inf"))
    world.coordinator._intake._admission = Admission(TOKENS, (), 2 * TOKENS, 10**6, 10**9)
    world.coordinator._intake._prefix_block_size = 16
    params = SamplingParams(max_tokens=16)

    def queue() -> None:
        for number in range(REQUESTS):
            submit = Submit(f"r{number}", (number, *range(1, TOKENS)), params)
            world.turn(decode(encode(submit)))

    def leave() -> None:
        for number in range(REQUESTS):
            world.turn(Cancel(f"r{number}"))
        world.turn()

    queue()  # what is made once, such as the metrics
    leave()
    tracemalloc.start()
    try:
        before = counted()
        queue()
        held = counted() - before
        leave()
        left = counted() - before
    finally:
        tracemalloc.stop()
    assert held / REQUESTS > TOKENS * BYTES_OF_A_TOKEN * 0.9
    assert held / REQUESTS < TOKENS * BYTES_OF_A_TOKEN + BYTES_OF_A_REQUEST
    assert left / REQUESTS < BYTES_OF_A_REQUEST / 4  # what the metrics remember of each


def test_memory_is_given_back_once_most_of_a_long_queue_has_gone():
    times: list[int] = []
    heap = HeapTrimmer(lambda: times.append(1))
    for tokens in (0, 900_000, 0, 20_000_000, 11_000_000):
        heap.observe(tokens)
    assert not times  # there was little, or there is much
    heap.observe(9_000_000)
    assert len(times) == 1
    heap.observe(8_500_000)
    assert len(times) == 1
    heap.observe(0)
    assert len(times) == 2


def test_the_library_here_can_do_that():
    HeapTrimmer().observe(0)


def test_packed_hashes_are_a_list_of_hashes():
    names = ["a", "bcd", "ef"]
    hashes = BlockHashes(names)
    for more in ("g", "longer", "h"):
        hashes.append(more)
        names.append(more)
        assert (len(hashes), hashes[:], hashes[1:3]) == (len(names), names, names[1:3])
        assert [hashes[index] for index in range(len(names))] == names
    assert list(hashes) == names
    assert not BlockHashes()
