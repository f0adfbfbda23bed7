from __future__ import annotations

import pytest
import torch

from fastserve_mega.worker.kv_cache import KvCache

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "block_size": 4, "head_dim": 8}


@pytest.fixture
def cache():
    return KvCache(num_blocks=6, dtype=torch.float32, device=torch.device("cpu"), **SHAPE)


def test_what_is_written_is_read_back_in_order_of_position(cache):
    table = [4, 2, 5]
    slots = torch.tensor([table[p // 4] * 4 + p % 4 for p in range(10)])
    index = cache.write_index(slots)
    written = [torch.randn(10, 2, 2, 8) for _ in range(3)]
    for layer, key_value in enumerate(written):
        cache.write(layer, index, key_value)
    read = cache.read_index(torch.tensor([table]))
    for layer, key_value in enumerate(written):
        key, value = cache.read(layer, read, 1)
        assert key.shape == (2, 12, 8)
        assert torch.equal(key[:, :10], key_value[:, :, 0].transpose(0, 1))
        assert torch.equal(value[:, :10], key_value[:, :, 1].transpose(0, 1))


def test_sequences_of_a_batch_are_kept_apart(cache):
    index = cache.write_index(torch.tensor([1 * 4, 3 * 4]))
    key_value = torch.randn(2, 2, 2, 8)
    cache.write(0, index, key_value)
    key, _ = cache.read(0, cache.read_index(torch.tensor([[1, 0], [3, 0]])), 2)
    # [sequence * kv_heads + head, position]
    assert torch.equal(key[:, 0].view(2, 2, 8), key_value[:, :, 0])
    assert not key[:, 4:].any()


def test_one_block_of_all_layers_is_contiguous(cache):
    assert cache.pool[3].is_contiguous()
    assert cache.pool[3].numel() == 3 * 2 * 2 * 4 * 8


def test_clear_zeroes_only_the_named_blocks(cache):
    cache.pool.fill_(torch.nan)
    cache.clear(torch.tensor([2, 5]))
    assert [bool(block.isnan().any()) for block in cache.pool] == [
        True, True, False, True, True, False,
    ]  # fmt: skip
    cache.clear(torch.tensor([], dtype=torch.long))


@pytest.fixture
def small():
    return KvCache(
        num_blocks=6, dtype=torch.float32, device=torch.device("cpu"), quantized=True, **SHAPE
    )


def test_eight_bits_are_exact_to_a_sixteenth_whatever_the_size_of_a_vector(small):
    table = [4, 2, 5]
    slots = torch.tensor([table[p // 4] * 4 + p % 4 for p in range(10)])
    sizes = 10.0 ** torch.arange(-6, 4)[:, None, None, None]
    written = sizes * torch.randn(10, 2, 2, 8)
    written[3, 1, 0] = 0
    small.write(1, small.write_index(slots), written)
    key, value = small.read(1, small.read_index(torch.tensor([table])), 1)
    for read, kind in ((key, 0), (value, 1)):
        given = written[:, :, kind].transpose(0, 1)
        most = given.abs().amax(dim=-1, keepdim=True)
        # Of each number, or where it is small beside the largest of its vector, of that.
        limit = torch.maximum(given.abs() / 15, most / 448 / 64)
        assert ((read[:, :10] - given).abs() <= limit).all()
    assert not small.pool[:, 0].any()


def test_eight_bits_and_their_scales_move_with_their_block(cache, small):
    assert small.pool[3].is_contiguous()
    assert small.pool[0].nbytes == 3 * 2 * 2 * 4 * (8 + 2)
    index = small.write_index(torch.tensor([2 * 4 + 1]))
    small.write(2, index, torch.full((1, 2, 2, 8), 3.0))
    small.pool[5] = small.pool[2]
    small.clear(torch.tensor([2]))
    for block, expected in ((5, 3.0), (2, 0.0)):
        key, _ = small.read(2, small.read_index(torch.tensor([[block]])), 1)
        torch.testing.assert_close(key[:, 1], torch.full((2, 8), expected), rtol=0.01, atol=0)


def test_a_pool_without_a_usable_block_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 blocks .* got 1"):
        KvCache(num_blocks=1, dtype=torch.float32, device=torch.device("cpu"), **SHAPE)
