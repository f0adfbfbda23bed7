"""Make an API key."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, fail
from fastserve_mega.records import convert
from fastserve_mega.system.api_keys import ApiKey, draw_secret, hash_secret


def _api_key(options: argparse.Namespace) -> int:
    secret = draw_secret()
    try:
        key = convert({"name": options.name, "sha256": hash_secret(secret)}, ApiKey)
    except ValueError as error:
        return fail(options, error)
    print(f"the secret, for {key.name} only (it is shown once):\n\n  {secret}\n")
    print("the entry, under keys: in the file that server.api_key_file names:\n")
    print(f'  - name: {key.name}\n    sha256: "{key.sha256}"')
    return 0


def _add_api_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of its owner, in metrics and in the file")


COMMAND = Command(
    name="api-key",
    summary="make an API key, and its entry for the file of keys",
    description="Draws a secret and prints it once, with the entry for the file that "
    "server.api_key_file names; the file holds a hash of the secret only. The entry may also have "
    "weight, requests_per_minute, tokens_per_minute, concurrency and most_urgent_priority "
    "(docs/api.md). A running server reads the file again when it changes.",
    examples=("alice",),
    run=_api_key,
    add_arguments=_add_api_key,
    config="none",
)
