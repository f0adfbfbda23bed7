from __future__ import annotations

import random

import pytest
import torch

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.worker import host_pool
from fastserve_mega.worker.host_pool import HostPool, _runs, open_copy_engine, touch_pages

BLOCKS = 64
BLOCK = (3, 2, 2, 4, 8)
WAIT_S = 60.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def device_pool(request, device):
    return torch.randn((BLOCKS, *BLOCK), device=device).to(request.param)


@pytest.fixture
def pools(device_pool):
    """(device pool, host pool, engine)"""
    host = HostPool(BLOCKS, device_pool)
    engine = open_copy_engine(device_pool, host, WAIT_S)
    yield device_pool, host.pool, engine
    engine.close()
    host.close()


def run(engine, *copies):
    engine.start(copies)
    engine.wait([copy.copy_id for copy in copies])


def test_blocks_come_back_bit_for_bit_at_other_places(pools):
    pool, host, engine = pools
    before = pool.clone()
    chooser = random.Random(7)
    out = chooser.sample(range(1, BLOCKS), 20)
    there = chooser.sample(range(1, BLOCKS), 20)
    back = chooser.sample([b for b in range(1, BLOCKS) if b not in out], 20)
    run(engine, BlockCopy(0, CopyDirection.SWAP_OUT, tuple(out), tuple(there), 0))
    pool[out] = torch.nan
    run(engine, BlockCopy(1, CopyDirection.SWAP_IN, tuple(there), tuple(back), 1))
    assert torch.equal(pool[back], before[out])
    if pool.device.type == "cpu":
        assert torch.equal(host[there], before[out])
    others = [b for b in range(BLOCKS) if b not in out + back]
    assert torch.equal(pool[others], before[others])


def test_a_copy_may_read_what_the_one_before_it_wrote(pools):
    """Reactive swapping: a victim leaves, another's KV takes its very blocks, in one plan."""
    pool, _, engine = pools
    before = pool.clone()
    run(engine, BlockCopy(0, CopyDirection.SWAP_OUT, (5, 6), (1, 2), 0))
    run(
        engine,
        BlockCopy(1, CopyDirection.SWAP_OUT, (8, 9), (3, 4), 1),
        BlockCopy(2, CopyDirection.SWAP_IN, (1, 2), (9, 8), 1),
        BlockCopy(3, CopyDirection.SWAP_OUT, (9,), (1,), 1),
        BlockCopy(4, CopyDirection.SWAP_IN, (3, 1), (10, 11), 1),
    )
    assert torch.equal(pool[[9, 8, 10, 11]], before[[5, 6, 8, 5]])


def test_a_copy_joins_neighbours():
    copy = BlockCopy(0, CopyDirection.SWAP_OUT, (9, 4, 3, 5, 8), (2, 7, 6, 9, 1), None)
    assert list(_runs(copy)) == [(3, 6, 2), (5, 9, 1), (8, 1, 2)]


def test_a_block_outside_the_pool_fails(pools):
    from fastserve_mega.worker.copy_engine import CopyFailedError

    pool, _, engine = pools
    if pool.device.type == "cuda":
        pytest.skip("a bad index on a CUDA device cannot be survived")
    with pytest.raises(CopyFailedError):
        run(engine, BlockCopy(0, CopyDirection.SWAP_OUT, (BLOCKS,), (1,), 0))


def test_every_page_of_a_pool_is_taken(monkeypatch):
    monkeypatch.setattr(host_pool, "_TOUCHED_BYTES", 2**16)
    pool = torch.full((5, 2**16 + 3), 7, dtype=torch.uint8)
    touch_pages(pool)
    assert not pool.view(-1)[:: 2**12].any()


def test_no_pool_takes_no_memory(device):
    pool = torch.zeros((4, *BLOCK), device=device)
    host = HostPool(0, pool)
    assert host.num_blocks == host.pool.nbytes == 0
    open_copy_engine(pool, host, WAIT_S).close()
    host.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_follow_the_computation_that_wrote_their_blocks():
    """And computation that waits for a copy reads what it wrote, all without the CPU waiting."""
    pool = torch.zeros((9, 1, 2, 8, 16, 128), device="cuda")
    host = HostPool(9, pool)
    engine = open_copy_engine(pool, host, WAIT_S)
    for step in range(1, 50):
        torch.cuda._sleep(1_000_000)
        pool[1:5].fill_(step)
        engine.start(
            [
                BlockCopy(2 * step, CopyDirection.SWAP_OUT, (1, 2, 3, 4), (4, 2, 8, 1), step),
                BlockCopy(2 * step + 1, CopyDirection.SWAP_IN, (4, 2, 8, 1), (5, 6, 7, 8), step),
            ]
        )
        engine.wait([2 * step, 2 * step + 1])
        pool[1:5].fill_(-1)
        assert (pool[5:9] == step).all()
        assert engine.take_wait_s() >= 0
    engine.close()
    host.close()
