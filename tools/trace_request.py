#!/usr/bin/env python3
"""Count what one streamed chat request passes through, from HTTP to a rank and back.

    tools/trace_request.py [--model DIRECTORY] [--list]

Runs the API server's application, the client, the coordinator and one rank in this process, the
rank with a fake runner, and follows every Python call into fastserve_mega. A class counts as

- of the request, when its objects do not get more with more tokens;
- of a step, when they do;
- of a copy, when they occur only when KV blocks are moved to the host and back.

Only objects that a function of the package holds in an argument, a variable or an attribute of
those are seen, and only those made while the request is served.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType

import httpx
import zmq

import fastserve_mega
from fastserve_mega.client import AsyncClient
from fastserve_mega.coordinator.main import CoordinatorProcess
from fastserve_mega.messaging.messages import Hello, Ping, Pong
from fastserve_mega.messaging.rank_messages import KeepAlive
from fastserve_mega.server.app import create_app
from fastserve_mega.system.config import (
    Config,
    CoordinatorConfig,
    KvCacheConfig,
    ModelConfig,
    SchedulerConfig,
    SwapConfig,
)
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.fake_runner import FakeModelRunner
from fastserve_mega.worker.loop import WorkerLoop, connect_to_coordinator

PACKAGE = Path(fastserve_mega.__file__).parent
MODEL = Path.home() / ".cache" / "fastserve_mega" / "smollm2-135m-instruct"
FEW_TOKENS, MANY_TOKENS = 6, 12
BLOCK_SIZE = 4
POOL_BLOCKS = 24
"""Room for one of the two requests whose blocks have to move for each other."""


NOT_OF_A_REQUEST = (Hello, Ping, Pong, KeepAlive)
"""Sent by the clock, or when a client connects."""


class Trace:
    """Follows the calls of all threads while `active`."""

    def __init__(self) -> None:
        self.active = False
        self.functions: set[tuple[str, int, str]] = set()
        self._seen: dict[int, object] = {}
        """Kept, so that no id is given to a second object."""
        self._old: set[int] = set()
        self._lock = threading.Lock()

    @property
    def files(self) -> set[str]:
        return {file for file, _, _ in self.functions}

    def begin(self) -> None:
        """Start again; what has been seen by now belongs to the server and not to a request."""
        with self._lock:
            self._old = set(self._seen)
            self.functions.clear()

    def made(self) -> Counter[str]:
        """Objects made since `begin`, by class."""
        return Counter(
            _class_name(thing)
            for key, thing in self._seen.items()
            if key not in self._old and not isinstance(thing, NOT_OF_A_REQUEST)
        )

    def known(self) -> set[str]:
        """Classes of all objects seen, before `begin` too."""
        return {_class_name(thing) for thing in self._seen.values()}

    def on_event(self, frame: FrameType, event: str, argument: object) -> None:
        """The function for `sys.setprofile`."""
        if not self.active or event not in ("call", "return"):
            return
        code = frame.f_code
        is_ours = code.co_filename.startswith(str(PACKAGE))
        if is_ours and not code.co_name.startswith("<"):
            file = str(Path(code.co_filename).relative_to(PACKAGE))
            self.functions.add((file, code.co_firstlineno, code.co_name))
        if is_ours or code.co_filename == "<string>":  # the constructor of a dataclass
            self._visit([*frame.f_locals.values(), argument if event == "return" else None])

    def _visit(self, thing: object) -> None:
        with self._lock:
            left = deque([thing])
            while left:
                each = left.popleft()
                if isinstance(each, list | tuple | set | frozenset | deque) and type(
                    each
                ).__module__ in ("builtins", "collections"):
                    left.extend(list(each))
                elif isinstance(each, dict):
                    left.extend(list(each.values()))
                elif self._is_ours(each) and id(each) not in self._seen:
                    self._seen[id(each)] = each
                    left.extend(_attributes(each))

    @staticmethod
    def _is_ours(thing: object) -> bool:
        module = getattr(type(thing), "__module__", "")
        return str(module).startswith("fastserve_mega.") and not isinstance(
            thing, Enum | type | BaseException
        )


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__.removeprefix('fastserve_mega.')}.{type(thing).__name__}"


def _attributes(thing: object) -> Iterator[object]:
    """Values of an object's attributes, without computing any."""
    yield from list(getattr(thing, "__dict__", {}).values())
    names = [*getattr(thing, "_fields", ()), *getattr(thing, "__struct_fields__", ())]
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    for name in names:
        yield getattr(thing, name, None)


@contextmanager
def serving(model: Path, trace: Trace, *, device_blocks: int) -> Iterator[str]:
    """A coordinator and one rank as threads; the endpoint for clients."""
    threading.setprofile(trace.on_event)
    sys.setprofile(trace.on_event)
    config = Config(
        model=ModelConfig(path=str(model)),
        kv_cache=KvCacheConfig(block_size=BLOCK_SIZE, swap=SwapConfig(strategy="reactive")),
        scheduler=SchedulerConfig(max_batch_size=2, max_batch_tokens=64),
        coordinator=CoordinatorConfig(
            client_endpoint="tcp://127.0.0.1:0", worker_endpoint="tcp://127.0.0.1:0"
        ),
    )
    process = CoordinatorProcess(config, stop_on_stdin_close=False)
    runner = FakeModelRunner(
        device_blocks=device_blocks, host_blocks=200, block_size=BLOCK_SIZE, vocab_size=300
    )
    addresses = process.addresses()
    context = zmq.Context()
    socket = connect_to_coordinator(context, addresses["worker"], 0)
    loop = WorkerLoop(socket, 0, runner, lambda: True)
    threads = [threading.Thread(target=process.run), threading.Thread(target=loop.run)]
    for thread in threads:
        thread.start()
    try:
        with closing(runner):
            yield addresses["client"]
            process.stop()
            for thread in threads:
                thread.join()
    finally:
        trace.active = False
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        context.destroy(linger=0)


async def _chat(endpoint: str, tokenizer: Tokenizer, trace: Trace, max_tokens: int) -> None:
    async with AsyncClient(endpoint, tokenizer) as client:
        app = create_app(client, tokenizer)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://trace") as http:
            trace.active = True
            for _ in range(2):  # the first one shows what is there anyway
                trace.begin()
                answer = await http.post(
                    "/v1/chat/completions",
                    json={
                        "messages": [{"role": "user", "content": "Hello"}],
                        "max_tokens": max_tokens, "temperature": 0, "stream": True,
                    },
                )  # fmt: skip
            trace.active = False
            if "data: [DONE]" not in answer.text:
                raise RuntimeError(f"the request failed: {answer.text}")


def trace_chat(model: Path, max_tokens: int) -> Trace:
    """One streamed chat request of so many tokens."""
    trace, tokenizer = Trace(), Tokenizer(model)
    with serving(model, trace, device_blocks=200) as endpoint:
        asyncio.run(_chat(endpoint, tokenizer, trace, max_tokens))
    return trace


async def _swap(endpoint: str, trace: Trace) -> None:
    async with AsyncClient(endpoint) as client:
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        trace.active = True
        jobs = [await client.submit([1 + i] * 40, params) for i in range(4)]
        for job in jobs:
            await job.wait()
        trace.active = False


def trace_swaps(model: Path) -> Trace:
    """Requests that do not fit into the device pool together."""
    trace = Trace()
    with serving(model, trace, device_blocks=POOL_BLOCKS) as endpoint:
        asyncio.run(_swap(endpoint, trace))
    return trace


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="directory with a tokenizer")
    parser.add_argument("--list", action="store_true", help="name the files and functions too")
    options = parser.parse_args()
    few, many = trace_chat(options.model, FEW_TOKENS), trace_chat(options.model, MANY_TOKENS)
    made_few, made_many = few.made(), many.made()
    per_step = sorted(name for name in made_many if made_many[name] > made_few[name])
    per_request = sorted(set(made_many) - set(per_step))
    per_copy = sorted(set(trace_swaps(options.model).made()) - many.known())
    print(f"{len(many.files):4} files entered")
    print(f"{len(many.functions):4} functions entered")
    for what, names in (("request", per_request), ("step", per_step), ("copy", per_copy)):
        print(f"{len(names):4} classes of one {what}: {', '.join(names)}")
    if options.list:
        for file in sorted(many.files):
            names = sorted(name for each, _, name in many.functions if each == file)
            print(f"{file}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
