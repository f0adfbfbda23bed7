"""Tokens drawn by the kernel are those that torch draws, by the same rules and random numbers."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.kernels import sampling
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.sampler import Sampler

VOCABULARY = 150
RULES = (
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.01, "min_tokens": 9},
    {"temperature": 5.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
)


def sequence(params, position):
    return SequenceInput(
        request_id=RequestId("r"),
        token_ids=[1],
        start=position - 1,
        block_table=[1],
        samples=True,
        params=SamplingParams(**params),
        seed=position % 3,
        prompt_tokens=4,
    )


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn((2 * len(RULES), VOCABULARY), generator=generator)
    logits[::2] = logits[::2].round()  # with equals
    return logits.to(DEVICE)


def test_the_kernel_draws_what_torch_draws(logits, monkeypatch):
    monkeypatch.setattr(sampling, "_COLUMNS", 64)
    sequences = [sequence(rules, position) for position in (5, 17) for rules in RULES]
    expected = Sampler((3,))(logits, sequences)
    assert Sampler((3,), draw=sampling.draw)(logits, sequences) == expected
    assert len(set(expected.token_ids)) > 8


def test_the_host_waits_once(logits, monkeypatch):
    """Whatever the rules are; a wait is where something is read back."""
    waits = []
    names = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")
    for name in names:
        real = getattr(torch.Tensor, name)

        def read(tensor, *arguments, name=name, real=real):
            waits.append(name)
            return real(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, read)
    rules = {"temperature": 1.0, "top_p": 0.9, "top_k": 7, "logit_bias": {4: 1.0}}
    sampler = Sampler((3,), draw=lambda logits, rules: torch.ones((1, 2), dtype=torch.float64))
    sampler(logits[:1], [sequence({**rules, "min_tokens": 9}, 5)])
    assert waits == ["tolist"]


def test_a_row_that_cannot_be_sampled_fails_alone(logits):
    logits[1] = torch.nan
    sequences = [sequence({"temperature": 1.0}, 5) for _ in range(3)]
    output = Sampler((), draw=sampling.draw)(logits[:3], sequences)
    assert [failure.index for failure in output.failures] == [1]
    assert output.token_ids[::2] == Sampler(())(logits[:3], sequences).token_ids[::2]
