from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_device import DEVICE
from torch import nn
from torch.nn import functional

from fastserve_mega.models.architecture import Experts
from fastserve_mega.worker.float8 import quantize_rows, widen
from fastserve_mega.worker.megatron.experts import ExpertMixture
from fastserve_mega.worker.megatron.kernel_layers import use_kernels
from fastserve_mega.worker.megatron.packing import Packable

HIDDEN, WIDE = 40, 24


class Float8Linear(Packable, nn.Linear):
    def forward(self, x):
        # Not scaled, as the kernel does not scale it either.
        return functional.linear(x, widen(self.weight, self.weight_scale))


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False, device=DEVICE).requires_grad_(False)


def float8_linear(inputs, outputs):
    made = Float8Linear(inputs, outputs, bias=False, device=DEVICE).requires_grad_(False)
    rows = quantize_rows(made.weight)
    made.use_float8()
    made.weight.copy_(rows.values)
    made.weight_scale.copy_(rows.scales)
    return made


@pytest.mark.parametrize("linear_of_expert", [linear, float8_linear])
def test_the_chosen_experts_of_this_rank_are_added_by_their_weights(monkeypatch, linear_of_expert):
    """Beside torch's way, with more choices than a tile for some expert, and none for another."""
    torch.manual_seed(3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    experts = [
        SimpleNamespace(
            linear_fc1=linear_of_expert(HIDDEN, 2 * WIDE),
            linear_fc2=linear_of_expert(WIDE, HIDDEN),
        )
        for _ in range(3)
    ]
    router = linear(HIDDEN, 5)
    router.weight[2] = -router.weight[3]
    layer = SimpleNamespace(
        router=router,
        experts=SimpleNamespace(local_experts=experts),
        local_expert_indices=[1, 2, 3],
        shared_experts=None,
    )
    rules = Experts(count=5, chosen=2, ffn_hidden_size=WIDE, normalized=True)
    mixture = ExpertMixture(layer, rules, functional.silu, None)
    x = torch.randn(40, HIDDEN, device=DEVICE)
    x[:30] = x[0] + 0.01 * x[:30]
    expected = mixture(x)
    use_kernels(mixture, "silu")
    torch.testing.assert_close(mixture(x), expected, rtol=1e-5, atol=1e-6)
    # Nothing is held twice.
    storages = {each.linear_fc1.weight.untyped_storage().data_ptr() for each in experts}
    assert len(storages) == 1
