from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_device import DEVICE, assert_scaled
from torch.nn import functional

from fastserve_mega.worker.float8 import Float8Rows, widen
from fastserve_mega.worker.kernels.rows import Norm, activate, add_and_norm, norm, scale_rows
from fastserve_mega.worker.megatron.layers import ACTIVATIONS

HIDDEN = 40


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(2)
    return lambda *shape: (2 * torch.randn(shape, generator=generator)).to(DEVICE)


@pytest.mark.parametrize("is_centered", [False, True])
def test_the_residual_is_added_and_normed(random, is_centered):
    x, residual, weight = random(3, HIDDEN), random(3, HIDDEN), random(HIDDEN)
    bias = random(HIDDEN) if is_centered else None
    weights = Norm(weight, bias, 1e-5, is_centered, offset=0.0 if is_centered else 1.0)
    normed, total = add_and_norm(x, residual, weights)
    assert torch.equal(total, x + residual)
    if is_centered:
        expected = functional.layer_norm(total, (HIDDEN,), weight, bias, 1e-5)
    else:
        expected = functional.rms_norm(total, (HIDDEN,), weight + 1, 1e-5)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(norm(total, weights), expected)


def scaled(x):
    made = Float8Rows.empty(tuple(x.shape), x)
    scale_rows(x, made)
    return made


def test_what_is_multiplied_in_8_bits_is_scaled_by_row(random):
    x = random(3, HIDDEN) * torch.tensor([[1.0], [1e-3], [0.0]], device=DEVICE)
    assert_scaled(scaled(x), x)
    numbers = torch.tensor([448.0, -3.25, 0.0, 2.0**-6, 15.0, -0.5, 2.0**-9, 112.0], device=DEVICE)
    exact = torch.stack((numbers, numbers * 2.0**-5))
    rows = scaled(exact)
    assert torch.equal(widen(rows.values, rows.scales), exact)
    weights = Norm(random(HIDDEN), None, 1e-5, is_centered=False, offset=0.0)
    rows, total = add_and_norm(x, x + 1, replace(weights, is_scaled=True))
    assert_scaled(rows, norm(total, weights))
    y = random(2, 2 * 24)
    assert_scaled(activate(y, "silu", gated=True, is_scaled=True), activate(y, "silu", gated=True))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(random, kind, gated):
    x = 3 * random(2, 2 * 24)
    expected = ACTIVATIONS[kind](x)
    if gated:
        expected = ACTIVATIONS[kind](x[:, :24]) * x[:, 24:]
    torch.testing.assert_close(activate(x, kind, gated=gated), expected, rtol=1e-5, atol=5e-6)
