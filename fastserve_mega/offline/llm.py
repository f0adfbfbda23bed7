"""A model inside a program: `LLM("directory").generate(prompts)`."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeVar, Unpack, cast

from msgspec import structs
from rich.console import Console
from rich.progress import track

from fastserve_mega.client import Client, RequestOptions
from fastserve_mega.client.sync_client import Generation
from fastserve_mega.launcher import LaunchError, temporary_deployment
from fastserve_mega.system.config import Config
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.locate import resolve_model
from fastserve_mega.types import FinishReason, SamplingParams, TokenLogprobs, Usage
from fastserve_mega.worker.rank import run_worker
from fastserve_mega.worker.topology import find_launcher

T = TypeVar("T")
Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, str]]
_AT_ONCE = 1024
"""Requests that are with the coordinator at a time: enough for any batch to be full."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each token when asked for."""


class LLM:
    """A model on ranks of its own, for as long as the program needs it. A context manager.

    Started as a plain program, it starts its ranks on this machine. Started by mpirun, srun or
    torchrun with as many ranks as the model has, it is one of them: the first rank goes on with the
    program, and on the others the constructor computes until the first is done and then exits.

    Args:
        model: directory, or name on the Hugging Face hub; None takes that of `config`.
        tensor: ranks that share each layer.
        pipeline: stages.
        data: copies of the model.
        config: a YAML file with more settings.
        settings: more of them as `section.field=value`.
        runner: of the ranks; `fake` computes nothing and is for tests.

    Raises:
        ValueError, OSError: the model or a setting cannot be used.
        LaunchError: the ranks do not start.
        SystemExit: on all ranks but the first of a launcher, when the first has ended.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tensor: int | None = None,
        pipeline: int | None = None,
        data: int | None = None,
        config: str | None = None,
        settings: Sequence[str] = (),
        runner: Literal["megatron", "fake"] = "megatron",
    ) -> None:
        given = {
            "model.path": None if model is None else json.dumps(model),
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.data": data,
        }
        overrides = ["scheduler.max_wait_s=null"]  # the program waits for all that it asks
        overrides += [f"{name}={given[name]}" for name in given if given[name] is not None]
        overrides += settings
        arguments = [] if config is None else ["--config", config]
        arguments += [word for each in overrides for word in ("--set", each)]
        loaded = load_config(config, overrides)
        with ExitStack() as stack:
            endpoint = _start(loaded, arguments, runner, stack)
            self._client = stack.enter_context(Client(endpoint))
            # Also when the program ends without a word.
            self._close = weakref.finalize(self, stack.pop_all().close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks; may be called again."""
        self._close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Completion]:
        """Continue texts, or token ids.

        Args:
            prompts: one, or many.
            params: for all of them, or for each.
            options: for all of them; see `RequestOptions`.

        Raises:
            ValueError: there are more or fewer params than prompts.
            ClientError: a request was refused, or the ranks were lost.
        """
        is_one = isinstance(prompts, str) or _begins_with(prompts, int)
        every = cast("Sequence[Prompt]", [prompts] if is_one else prompts)
        return self._all(every, params, lambda each, p: self._client.generate(each, p, **options))

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Completion]:
        """Answer one conversation or many, each a list of messages with `role` and `content`.

        `params` and `options` are those of `generate`, and so is what is raised.
        """
        is_one = _begins_with(conversations, Mapping)
        every = cast("Sequence[Conversation]", [conversations] if is_one else conversations)
        return self._all(every, params, lambda each, p: self._client.chat(each, p, **options))

    def _all(
        self,
        inputs: Sequence[T],
        params: SamplingParams | Sequence[SamplingParams] | None,
        start: Callable[[T, SamplingParams | None], Generation],
    ) -> list[Completion]:
        if params is None or isinstance(params, SamplingParams):
            each_params: Sequence[SamplingParams | None] = [params] * len(inputs)
        elif len(params) == len(inputs):
            each_params = params
        else:
            raise ValueError(f"there are {len(params)} params for {len(inputs)} prompts")
        answers = track(
            _in_order(zip(inputs, each_params, strict=True), lambda both: start(*both)),
            description="answers",
            total=len(inputs),
            console=Console(stderr=True),
            transient=True,
            disable=len(inputs) == 1,
        )
        return list(answers)


def _begins_with(inputs: Sequence[object], kind: type) -> bool:
    return bool(inputs) and isinstance(inputs[0], kind)


def _start(
    config: Config,
    arguments: Sequence[str],
    runner: Literal["megatron", "fake"],
    stack: ExitStack,
) -> str:
    """Start the ranks; the stack ends them. Returns the coordinator's address."""
    if is_launched():
        # One and the same for all ranks, so its port is found out when it is there.
        arguments = [*arguments, "--set", "coordinator.client_endpoint=tcp://127.0.0.1:0"]
        rank = LaunchedRank(config, arguments, runner)
        stack.callback(rank.close)
        return rank.endpoint
    model = resolve_model(config.model, weights=runner == "megatron")
    config = structs.replace(config, model=model)
    deployment = temporary_deployment(config, arguments, http=False, runner=runner)
    return stack.enter_context(deployment).coordinator.client_endpoint


def _in_order(inputs: Iterable[T], start: Callable[[T], Generation]) -> Iterator[Completion]:
    """Answers in the order of the inputs, so many of which are asked at a time."""
    under_way: deque[Generation] = deque()
    for each in inputs:
        if len(under_way) == _AT_ONCE:
            yield _whole(under_way.popleft())
        under_way.append(start(each))
    while under_way:
        yield _whole(under_way.popleft())


def _whole(generation: Generation) -> Completion:
    for _ in generation:
        pass
    assert generation.finish_reason is not None  # an error would have been raised
    assert generation.usage is not None
    return Completion(
        generation.text,
        generation.token_ids,
        generation.finish_reason,
        generation.usage,
        generation.logprobs,
    )


_END_S = 60.0


def is_launched() -> bool:
    """Whether mpirun, srun or torchrun has started this program as one of several ranks."""
    launcher = find_launcher(os.environ)
    return launcher is not None and int(os.environ.get(launcher.world_size, "1")) > 1


class LaunchedRank:
    """The first rank, on a thread beside the program; the other ranks do not get that far.

    Args:
        config: the same on all ranks; its coordinator listens for clients at a free port.
        arguments: --config and --set arguments that give the coordinator the same configuration.
        runner: of the ranks.

    Raises:
        LaunchError: the ranks did not start.
        SystemExit: on all other ranks, when the first one has ended.
    """

    def __init__(
        self,
        config: Config,
        arguments: Sequence[str],
        runner: Literal["megatron", "fake"] = "megatron",
    ) -> None:
        launcher = find_launcher(os.environ)
        if launcher is None or os.environ[launcher.rank] != "0":
            sys.exit(run_worker(config, arguments, runner))
        ready: queue.Queue[tuple[str, Callable[[], None]] | int] = queue.Queue()

        def be_rank() -> None:
            status = 1
            try:
                status = run_worker(
                    config, arguments, runner, on_ready=lambda *found: ready.put(found)
                )
            finally:
                ready.put(status)

        self._thread = threading.Thread(target=be_rank, daemon=True, name="rank 0")
        self._thread.start()
        found = ready.get()  # the ranks' own time limits end this
        if isinstance(found, int):
            raise LaunchError(f"the ranks ended with status {found}")
        self.endpoint, self._stop = found

    def close(self) -> None:
        """End all ranks."""
        self._stop()
        self._thread.join(_END_S)
