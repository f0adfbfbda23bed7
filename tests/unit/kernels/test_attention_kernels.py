"""Attention, rotation and the writing of the cache, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, assert_scaled

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.kernels.attention import attend
from fastserve_mega.worker.kernels.pages import HeadNorm, Pages, Turns, rotate_and_write
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.step_batch import PackedStep, StepShape

BLOCK_SIZE = 16
LAYER = 1
SCALE = 0.3
CONTEXTS = ((1, 299), (1, 0), (1, 70), (20, 0), (37, 45))
"""(new tokens, tokens before) of each sequence, the decoding ones first, longest first."""


class World:
    """A step whose sequences have keys and values in a cache full of NaN, and what should come."""

    def __init__(  # noqa: PLR0917
        self, kv_heads, group, head_dim, contexts=CONTEXTS, quantized=False, dtype=torch.float32
    ):
        generator = torch.Generator().manual_seed(5)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype).float()

        self.cache = KvCache(
            num_blocks=45, num_layers=2, num_kv_heads=kv_heads, block_size=BLOCK_SIZE,
            head_dim=head_dim, dtype=dtype, device=DEVICE, quantized=quantized,
        )  # fmt: skip
        self.cache.pool[1:] = 0x7F if quantized else torch.nan
        free = iter(range(44, 0, -1))
        self.batch = [
            SequenceInput(
                request_id=RequestId(str(index)),
                token_ids=[1] * new,
                start=before,
                block_table=[next(free) for _ in range(-(-(new + before) // BLOCK_SIZE))],
                samples=True,
                params=SamplingParams(),
                seed=0,
                prompt_tokens=1,
            )
            for index, (new, before) in enumerate(contexts)
        ]
        self.batch.sort(key=lambda s: (len(s.token_ids) > 1, -len(s.block_table)))
        self.keys_and_values = [random(s.context, kv_heads, 2, head_dim) for s in self.batch]
        queries = [random(len(s.token_ids), kv_heads, group, head_dim) for s in self.batch]
        self.qkv = torch.cat(
            [
                torch.cat((query, known[s.start :]), dim=2)
                for s, query, known in zip(self.batch, queries, self.keys_and_values, strict=True)
            ]
        ).to(DEVICE, dtype)
        self.queries = queries
        for s, known in zip(self.batch, self.keys_and_values, strict=True):
            slots = [s.block_table[p // 16] * 16 + p % 16 for p in range(s.start)]
            index = self.cache.write_index(torch.tensor(slots, dtype=torch.long, device=DEVICE))
            self.cache.write(LAYER, index, known[: s.start].to(DEVICE, dtype))

    def attend(self, room=None, window=None, softcap=None, is_scaled=False):
        step = PackedStep(self.batch, BLOCK_SIZE, room).to(DEVICE)
        pages = Pages.of(self.cache)
        qkv = self.qkv
        if room is not None:
            qkv = torch.cat((qkv, qkv.new_zeros(room.rows - len(qkv), *qkv.shape[1:])))
        rotate_and_write(qkv, pages, LAYER, step.slots, step.positions, turns=None, norm=None)
        out = attend(
            qkv, pages, LAYER, step,
            scale=SCALE, window=window, softcap=softcap, is_scaled=is_scaled,
        )  # fmt: skip
        return out if is_scaled else out.cpu()

    def expected(self, window=None, softcap=None):
        return torch.cat(
            [
                _reference(query.double(), known.double(), window, softcap)
                for query, known in zip(self.queries, self.keys_and_values, strict=True)
            ]
        ).float()


def _reference(query, known, window, softcap):
    key, value = known.unbind(dim=2)
    scores = torch.einsum("thgd,shd->hgts", query, key) * SCALE
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    at = torch.arange(len(known))
    own = at[len(known) - len(query) :, None]
    hidden = at > own
    if window is not None:
        hidden |= at <= own - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hgts,shd->thgd", weights, value).flatten(1)


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((2, 4, 64), {}),
        ((1, 3, 80), {"window": 37}),
        ((1, 1, 16), {"softcap": 5.0}),
    ],
)
def test_attention_equals_float64_with_nan_in_all_other_slots(heads, options):
    world = World(*heads)
    torch.testing.assert_close(
        world.attend(**options), world.expected(**options), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_attention_in_16_bits_is_as_exact_as_16_bits_are(dtype, quantized):
    world = World(1, 2, 32, quantized=quantized, dtype=dtype)
    error = world.attend().float() - world.expected()
    assert error.abs().max() < (0.15 if quantized else 0.02)


@pytest.mark.parametrize("contexts", [CONTEXTS, CONTEXTS[1:2], CONTEXTS[3:]])
def test_what_weights_in_8_bits_are_multiplied_with_is_scaled_by_token(contexts):
    """Where splits are merged, where there are none, and both in a step."""
    world = World(1, 3, 24, contexts=contexts, dtype=torch.bfloat16)
    assert_scaled(world.attend(is_scaled=True), world.attend().to(DEVICE))


def test_rows_that_fill_a_step_up_change_nothing():
    world = World(1, 2, 16, contexts=CONTEXTS[:3])
    untouched = world.cache.pool[0].clone()
    out = world.attend(room=StepShape.of_decodes(sequences=5, blocks=21))
    torch.testing.assert_close(out[:3], world.expected(), rtol=0, atol=2e-5)
    assert not out[3:].any()
    assert torch.equal(world.cache.pool[0], untouched)


def test_eight_bits_are_read_as_torch_reads_them():
    world = World(1, 2, 32, quantized=True)
    out = world.attend()
    for index, sequence in enumerate(world.batch):
        tables = torch.tensor([list(sequence.block_table)], device=DEVICE)
        both = world.cache.read(LAYER, world.cache.read_index(tables), 1)
        known = torch.stack([each[:, : sequence.context].cpu() for each in both])
        known, exact = known.permute(2, 1, 0, 3), world.keys_and_values[index]
        assert ((known - exact).abs() <= exact.abs() / 14 + 0.01).all()
        world.keys_and_values[index] = known
    torch.testing.assert_close(out, world.expected(), rtol=0, atol=2e-5)


def test_eight_bits_are_written_as_torch_writes_them():
    """Numbers that 8 bits hold, since a device divides with an error."""
    world = World(2, 1, 16, contexts=((3, 14),), quantized=True)
    numbers = torch.tensor([448.0, -3.25, 0.0, 2.0**-6, 15.0, -0.5, 2.0**-9, 112.0])
    world.qkv[:] = numbers.repeat(2) * torch.tensor([1.0, 2.0**-5, 2.0**7])[:, None, None, None]
    twin = world.cache.pool.clone()
    world.attend()
    written = world.cache.pool.clone()
    world.cache.pool.copy_(twin)
    step = PackedStep(world.batch, BLOCK_SIZE).to(DEVICE)
    world.cache.write(LAYER, world.cache.write_index(step.slots), world.qkv[:, :, 1:])
    assert torch.equal(world.cache.pool, written)


@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_normed_and_rotated(normed):
    world = World(2, 3, 16, contexts=((5, 30),))
    before = world.qkv.clone()
    turns = Turns(torch.tensor([1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4], device=DEVICE), 1.5)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn((2, 16), generator=generator).to(DEVICE)
    norm = HeadNorm(weights[0], weights[1], 1e-5, 1.0) if normed else None
    step = PackedStep(world.batch, BLOCK_SIZE).to(DEVICE)
    pages = Pages.of(world.cache)
    rotate_and_write(world.qkv, pages, LAYER, step.slots, step.positions, turns=turns, norm=norm)
    expected = before.double()
    if normed:
        shrunk = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected[:, :, :3] = shrunk[:, :, :3] * (1 + weights[0])
        expected[:, :, 3] = shrunk[:, :, 3] * (1 + weights[1])
    angles = step.positions[:, None].double() * turns.frequencies
    cosine, sine = 1.5 * angles.cos()[:, None, None], 1.5 * angles.sin()[:, None, None]
    low, high = expected[:, :, :4].chunk(2, dim=-1)
    rotated = torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
    torch.testing.assert_close(world.qkv[:, :, :3].double(), rotated[:, :, :3], rtol=0, atol=2e-5)
    key, value = world.cache.read(LAYER, world.cache.read_index(step.block_tables), 1)
    torch.testing.assert_close(
        key[:, 30:35].transpose(0, 1).double(), rotated[:, :, 3], rtol=0, atol=2e-5
    )
    assert torch.equal(value[:, 30:35].transpose(0, 1), before[:, :, 4])
