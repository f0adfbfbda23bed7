"""Make the keys of the clients' port."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import FILE, Command, complete_with, fail
from fastserve_mega.system.key_file import PortKeys, write_key_files


def _keygen(options: argparse.Namespace) -> int:
    import zmq

    public, secret = (key.decode() for key in zmq.curve_keypair())
    try:
        for_clients = write_key_files(options.file, PortKeys(public, secret))
    except OSError as error:
        return fail(options, error)
    print(f"{options.file} is for the coordinator, {for_clients} for clients")
    return 0


def _add_keygen(parser: argparse.ArgumentParser) -> None:
    complete_with(parser.add_argument("file", type=Path, help="to be written, with FILE.pub"), FILE)


COMMAND = Command(
    name="keygen",
    summary="make the keys that ZeroMQ clients need to connect",
    description="Writes a key pair for coordinator.client_endpoint: FILE for the coordinator, "
    "FILE.pub for its clients. Name the one or the other as coordinator.client_key_file; who has "
    "neither cannot connect.",
    examples=("clients.key",),
    run=_keygen,
    add_arguments=_add_keygen,
    config="none",
)
