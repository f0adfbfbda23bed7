from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_device import DEVICE
from torch.nn import functional

from fastserve_mega.worker.float8 import quantize_rows, widen
from fastserve_mega.worker.kernels.rows import Norm, activate, add_and_norm, norm, scale
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


def assert_scaled(rows, expected):
    """As torch scales; a device divides with an error that may round to a neighbour."""
    scaled = quantize_rows(expected)
    assert (rows.values.dtype, rows.dtype) == (torch.float8_e4m3fn, expected.dtype)
    torch.testing.assert_close(rows.scales, scaled.scales)
    steps = (rows.values.view(torch.uint8).int() - scaled.values.view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps == 0).float().mean() > 0.98


def test_what_is_multiplied_in_8_bits_is_scaled_by_row(random):
    x = random(3, HIDDEN) * torch.tensor([[1.0], [1e-3], [0.0]], device=DEVICE)
    assert_scaled(scale(x), x)
    numbers = torch.tensor([448.0, -3.25, 0.0, 2.0**-6, 15.0, -0.5, 2.0**-9, 112.0], device=DEVICE)
    exact = torch.stack((numbers, numbers * 2.0**-5))
    rows = scale(exact)
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
