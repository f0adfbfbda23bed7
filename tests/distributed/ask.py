"""A client as a process: answers each line of prompts on stdin (JSON) with a line of tokens.

Usage: python ask.py ENDPOINT MAX_TOKENS PATIENCE_S
"""

import json
import sys
import time

from fastserve_mega.client import Client, ServerError, ServerUnavailableError
from fastserve_mega.types import SamplingParams


def main() -> None:
    endpoint, max_tokens, patience_s = sys.argv[1:]
    params = SamplingParams(max_tokens=int(max_tokens), temperature=0.0)
    await_server(endpoint, float(patience_s))
    with Client(endpoint, timeout_s=60) as client:
        for line in sys.stdin:
            print(json.dumps(answer(client, json.loads(line), params)), flush=True)


def answer(client: Client, prompts: list[list[int]], params: SamplingParams) -> dict:
    try:
        generations = [client.submit(prompt, params) for prompt in prompts]
        return {"tokens": [list(generation.wait().token_ids) for generation in generations]}
    except (ServerError, ServerUnavailableError) as error:
        return {"error": str(error)}


def await_server(endpoint: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with Client(endpoint, timeout_s=1):
                return
        except ServerUnavailableError:
            if time.monotonic() > deadline:
                raise


main()
