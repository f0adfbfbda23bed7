"""A client as a process: prints the tokens of each prompt as JSON, or the error it was told.

Usage: python ask.py ENDPOINT PROMPTS MAX_TOKENS PATIENCE_S
"""

import json
import sys
import time

from fastserve_mega.client import Client, ServerError, ServerUnavailableError
from fastserve_mega.types import SamplingParams


def main() -> None:
    endpoint, prompts, max_tokens, patience_s = sys.argv[1:]
    params = SamplingParams(max_tokens=int(max_tokens), temperature=0.0)
    await_server(endpoint, float(patience_s))
    with Client(endpoint, timeout_s=30) as client:
        generations = [client.submit(prompt, params) for prompt in json.loads(prompts)]
        try:
            answers = [list(generation.wait().token_ids) for generation in generations]
        except ServerError as error:
            print(json.dumps({"error": str(error)}))
            return
    print(json.dumps({"tokens": answers}))


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
