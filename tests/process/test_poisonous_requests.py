"""No request takes a rank with it: it gets an answer or a reason, and others get their tokens."""

from __future__ import annotations

import math

import pytest
from fake_server import VOCAB, expected_tokens
from test_sampling_options import SamplingRunner

from fastserve_mega.client import Client, InvalidRequestError, ServerError
from fastserve_mega.messaging.frames import MAX_FRAME_BYTES
from fastserve_mega.messaging.messages import Finished, Ping, Pong, Submit, Tokens
from fastserve_mega.types import FinishReason, SamplingParams, StructuredOutput
from fastserve_mega.worker import drawing

BASE = {"max_tokens": 8, "temperature": 1.0, "seed": 7, "ignore_eos": True}
POISON_PROMPT = (9, 9, 9)
CURSED_TOP_P = 0.123


class NanRunner(SamplingRunner):
    """A model that computes NaN for one prompt."""

    def adjust(self, row, sequence):
        if tuple(sequence.token_ids[:3]) == POISON_PROMPT:
            row.fill_(math.nan)


def generate(client, prompt=(5, 6, 7), **change):
    return client.submit(prompt, SamplingParams(**{**BASE, **change}))


ANSWERED = [
    {"temperature": 1e-46, "top_p": 0.5},
    {"temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0},
    {"repetition_penalty": 1e-40, "top_p": 0.5},
    {"repetition_penalty": 5e-324, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"logit_bias": dict.fromkeys(range(VOCAB), -100.0), "top_k": 2**62},
    {"stop_token_ids": (2**62,), "min_tokens": 8, "logprobs": 20},
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_extreme_parameters_are_answered_and_harm_nobody(start_server, ranks):
    with (
        start_server(make_runner=SamplingRunner, ranks=ranks) as server,
        Client(server.endpoint) as client,
    ):
        alone = generate(client).wait().token_ids
        bystanders = [generate(client) for _ in range(3)]
        for done in [generate(client, **change) for change in ANSWERED]:
            assert len(done.wait().token_ids) == BASE["max_tokens"]
        assert [each.wait().token_ids for each in bystanders] == [alone] * 3
        assert server.ended_with is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_that_cannot_be_sampled_ends_its_request_only(start_server, ranks, monkeypatch):
    threshold = drawing._top_p_threshold

    def broken(weights, top_p):
        if top_p == CURSED_TOP_P:
            raise IndexError("index -1 is out of bounds")
        return threshold(weights, top_p)

    monkeypatch.setattr(drawing, "_top_p_threshold", broken)
    with (
        start_server(make_runner=NanRunner, ranks=ranks) as server,
        Client(server.endpoint) as client,
    ):
        alone = generate(client, top_p=0.9).wait().token_ids
        server.runner.open_gate.clear()
        around = [generate(client, top_p=0.9) for _ in range(2)]
        cursed = generate(client, top_p=CURSED_TOP_P)
        nan = generate(client, POISON_PROMPT)
        around += [generate(client, top_p=0.9) for _ in range(2)]
        server.runner.open_gate.set()
        with pytest.raises(ServerError, match="IndexError: index -1 is out of bounds"):
            cursed.wait()
        with pytest.raises(ServerError, match="the model's logits are not finite"):
            nan.wait()
        assert [each.wait().token_ids for each in around] == [alone] * 4
        assert server.ended_with is None


def test_min_tokens_that_hold_back_the_whole_vocabulary_are_refused(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        everything = {"min_tokens": 2, "stop_token_ids": tuple(range(1, VOCAB))}
        with pytest.raises(InvalidRequestError, match=f"all {VOCAB} tokens of the vocabulary"):
            generate(client, **everything).wait()
        assert generate(client, **{**everything, "min_tokens": 0}).wait().usage is not None


def test_a_step_that_no_frame_could_hold_is_sent_in_several(start_server, raw_client):
    """Each request is within the limits, and all are new in the same step."""
    long = SamplingParams(
        max_tokens=3, temperature=0.0, structured=StructuredOutput(regex="\U0001f642" * 65_536)
    )
    count = MAX_FRAME_BYTES // (4 * 65_536) + 4
    with start_server(device_blocks=1024, max_batch_size=2 * count) as server:
        client, first = raw_client(server), raw_client(server)
        server.runner.open_gate.clear()
        server.runner.entered.clear()
        first.send(Submit("first", (1, 2), SamplingParams(max_tokens=2, temperature=0.0)))
        assert server.runner.entered.wait(20)
        for number in range(count):
            client.send(Submit(f"r{number}", (1 + number, 2), long))
        client.send(Ping())
        assert isinstance(client.receive(), Pong)
        server.runner.open_gate.set()
        outputs, finished = {}, 0
        while finished < count:
            match message := client.receive():
                case Tokens():
                    outputs.setdefault(message.request_id, []).extend(message.token_ids)
                case Finished():
                    assert message.reason is FinishReason.LENGTH
                    finished += 1
        assert outputs == {
            f"r{number}": list(expected_tokens((1 + number, 2), 3)) for number in range(count)
        }
        assert server.ended_with is None
