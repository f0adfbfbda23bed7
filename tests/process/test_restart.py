"""Losing the ranks is a pause and not an error, when somebody starts them again."""

import contextlib
import threading
import time

import pytest
from fake_server import WAIT_MS, GatedRunner, expected_tokens

from fastserve_mega.client import Client, InvalidRequestError, ServerError
from fastserve_mega.messaging.messages import (
    Finished,
    Restarting,
    Submit,
    Tokens,
    Welcome,
)
from fastserve_mega.types import FinishReason, SamplingParams

PROMPTS = [[1 + i, 2, 3, 4, 5] for i in range(3)]
COUNT = 200


def params():
    return SamplingParams(max_tokens=COUNT, temperature=0.0)


def test_answers_go_on_after_the_ranks_were_lost(start_server, tmp_path):
    options = {
        "coordinator": {"client_endpoint": f"ipc://{tmp_path}/clients", "drain_timeout_s": 30.0},
        "supervised": True,
    }
    with start_server(**options) as first:
        client = Client(first.endpoint)
        generations = [client.submit(prompt, params()) for prompt in PROMPTS]
        chunks = iter(generations[0])
        for _ in range(5):
            next(chunks)
        first.runner.fail_with = RuntimeError("the device fell off")
        assert first.lost_ranks.wait(WAIT_MS / 1000)
    with client, start_server(**options):
        for prompt, generation in zip(PROMPTS, generations, strict=True):
            result = generation.wait()
            assert result.finish_reason is FinishReason.LENGTH
            assert result.token_ids == expected_tokens(prompt, COUNT)


def test_clients_are_told_to_be_patient(start_server, raw_client):
    with start_server(supervised=True, coordinator={"startup_timeout_s": 77.0}) as server:
        client = raw_client(server)
        client.send(Submit("patient", (1, 2), params()))
        assert isinstance(client.receive(), Tokens)
        server.runner.fail_with = RuntimeError("the device fell off")
        *_, last = client.receive_until(Restarting)
    assert last.within_s == 77.0
    assert "the device fell off" in last.reason


def test_without_a_supervisor_they_are_told_the_end(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        generation = client.submit(PROMPTS[0], params())
        server.runner.fail_with = RuntimeError("the device fell off")
        with pytest.raises(ServerError, match="the device fell off"):
            generation.wait()


def test_while_it_drains_nobody_is_told_to_wait_for_a_restart(start_server, raw_client):
    options = {"drain_timeout_s": WAIT_MS / 1000, "startup_timeout_s": 77.0}
    with start_server(supervised=True, coordinator=options) as server:
        client = raw_client(server)
        client.send(Submit("cut off", (1, 2), params()))
        assert isinstance(client.receive(), Tokens)
        server.runner.open_gate.clear()
        server.process.stop()
        *_, welcome = client.receive_until(Welcome)
        assert welcome.restart_within_s == 0  # should it be killed as well
        server.runner.fail_with = RuntimeError("the device fell off")
        server.runner.open_gate.set()
        *_, last = client.receive_until(Finished)
    assert last.reason is FinishReason.ERROR
    assert "the device fell off" in last.message


def test_a_pause_of_the_whole_machine_is_nobodys_fault(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        server.runner.open_gate.clear()
        server.runner.entered.clear()
        generation = client.submit(PROMPTS[0], params())
        assert server.runner.entered.wait(WAIT_MS / 1000)
        clock = server.process._clock
        clock._clock = lambda: time.monotonic() + 3600.0
        client.snapshot()  # it has looked at its clock, and at the silence of its ranks and clients
        client.snapshot()
        server.runner.open_gate.set()
        assert generation.wait().token_ids == expected_tokens(PROMPTS[0], COUNT)


# --- a request that kills ranks ------------------------------------------------------------------

POISON = (66, 66, 66)


class PoisonedRunner(GatedRunner):
    """Fails whenever it computes one prompt; remembers what it computed beside it."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.died = threading.Event()
        self.last_batch: list[tuple[int, ...]] = []

    def execute(self, batch):
        if any(tuple(sequence.token_ids[:3]) == POISON for sequence in batch):
            self.last_batch = [tuple(sequence.token_ids) for sequence in batch]
            self.died.set()
            raise RuntimeError("killed by what it was given")
        return super().execute(batch)


def test_a_request_that_kills_ranks_is_found_out_and_the_others_go_on(start_server, tmp_path):
    options = {
        "coordinator": {"client_endpoint": f"ipc://{tmp_path}/clients", "drain_timeout_s": 30.0},
        "supervised": True,
        "make_runner": PoisonedRunner,
    }
    with contextlib.ExitStack() as closing:
        with start_server(**options) as first:
            client = closing.enter_context(Client(first.endpoint))
            first.runner.open_gate.clear()
            first.runner.entered.clear()
            held = client.submit([7, 7], SamplingParams(max_tokens=4, temperature=0.0))
            assert first.runner.entered.wait(WAIT_MS / 1000)
            # All of these begin in one step.
            generations = [client.submit(prompt, params()) for prompt in PROMPTS]
            poison = client.submit(POISON, params())
            client.snapshot()
            first.runner.open_gate.set()
            assert first.runner.died.wait(WAIT_MS / 1000)
            assert first.lost_ranks.wait(WAIT_MS / 1000)
        assert len(first.runner.last_batch) >= len(PROMPTS) + 1
        with start_server(**options) as second:
            assert second.runner.died.wait(WAIT_MS / 1000)
            assert second.lost_ranks.wait(WAIT_MS / 1000)
        # No other request that has not yielded a token since the first loss was in this step.
        assert POISON in second.runner.last_batch
        assert not {tuple(prompt) for prompt in PROMPTS} & set(second.runner.last_batch)
        with start_server(**options) as third:
            with pytest.raises(InvalidRequestError, match="lost 2 times in a row while"):
                poison.wait()
            for prompt, generation in zip(PROMPTS, generations, strict=True):
                assert generation.wait().token_ids == expected_tokens(prompt, COUNT)
            assert held.wait().token_ids == expected_tokens([7, 7], 4)
            assert not third.runner.died.is_set()


def test_only_the_owner_is_told_which_requests_are_suspected(start_server, raw_client):
    with start_server(supervised=True) as server:
        owner, stranger = raw_client(server), raw_client(server)
        for client, name in ((owner, "mine"), (stranger, "theirs")):
            client.send(Submit(name, (1, 2), params()))
            assert isinstance(client.receive(), Tokens)
        server.runner.fail_with = RuntimeError("the device fell off")
        assert [*owner.receive_until(Restarting)][-1].suspects == ("mine",)
        assert [*stranger.receive_until(Restarting)][-1].suspects == ("theirs",)
