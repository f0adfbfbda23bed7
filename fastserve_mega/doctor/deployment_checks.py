"""Checks of a configuration on this machine: its ports, its model, and whether it fits."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import structs

from fastserve_mega.doctor.finding import Finding, ProbeError, ok, problem, python_probe, warning
from fastserve_mega.doctor.machine import GIB
from fastserve_mega.models.architecture import Architecture, load_architecture
from fastserve_mega.system.config import Config
from fastserve_mega.system.deployment import DeploymentPlan, plan_deployment
from fastserve_mega.system.host_memory import host_memory
from fastserve_mega.system.locate import find_architecture, has_tokenizer, resolve_model
from fastserve_mega.system.sizes import CPU_POOL_GB
from fastserve_mega.system.stored_tensors import check_tensors
from fastserve_mega.text.tokenizer import Tokenizer

_WEIGHT_FILES = ("*.safetensors", "*.distcp", "iter_*/*.distcp")
_DEVICE_BYTES = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
sizes = [torch.cuda.get_device_properties(device).total_memory for device in range(count)]
print(json.dumps(min(sizes, default=None)))
"""


def check_ports(config: Config) -> Iterator[Finding]:
    """Check that the addresses to listen on are this machine's, and free."""
    addresses = {
        "coordinator.client_endpoint": _split(config.coordinator.client_endpoint),
        "coordinator.worker_endpoint": _split(config.coordinator.worker_endpoint),
        "server.port": (config.server.host, config.server.port),
    }
    for setting, (host, port) in addresses.items():
        yield _check_port(setting, host, port)


def _split(endpoint: str) -> tuple[str, int]:
    """Host and port of a ZeroMQ address; port 0 for what is not TCP."""
    parts = urlsplit(endpoint)
    host, _, port = parts.netloc.rpartition(":")
    return ("0.0.0.0" if host == "*" else host.strip("[]")), int(port) if port.isdigit() else 0


def _check_port(setting: str, host: str, port: int) -> Finding:
    where = f"{host}:{port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                remedy = f"end what listens there, or choose another with --set {setting}=…"
                return problem(setting, f"{where} is in use", remedy)
            if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                remedy = f"right on other hosts; on the one that listens, change {setting}"
                return warning(setting, f"{where} is not an address of this machine", remedy)
            return problem(setting, f"{where}: {error.strerror}", f"change {setting}")
    return ok(setting, f"{where} is free" if port else "takes any free port")


def check_model(config: Config, config_file: Path) -> Iterator[Finding]:
    """Check that the model is there, complete, and can be read."""
    directory, named = _find(config)
    if named and not directory.is_dir():
        said = f"{directory} is not on this machine: it is fetched from the hub at the start"
        remedy = f"see that it can be, {_download_size(config, config_file)}"
        yield warning("model", said, remedy)
        return
    if not directory.is_dir():
        said = f"there is no directory {directory}"
        yield problem("model", said, f"fetch the model, {_download_size(config, config_file)}")
        return
    architecture = load_architecture(directory)
    weights = [path for pattern in _WEIGHT_FILES for path in directory.glob(pattern)]
    unreadable = [path.name for path in weights if path.exists() and not os.access(path, os.R_OK)]
    wrong = "" if unreadable else _wrong_tensors(directory, architecture)
    if unreadable:
        yield problem("model", f"{unreadable[0]} cannot be read", "change its permissions")
    elif wrong:
        yield problem("model", wrong, "convert the weights, or fetch the model again")
    else:
        size = sum(path.stat().st_size for path in weights)
        yield ok("model", f"{directory}, {size / GIB:.1f} GiB of weights")
    if not has_tokenizer(directory):
        remedy = "put tokenizer.json there: clients and the HTTP server need it"
        yield warning("model", f"{directory} has no tokenizer", remedy)
        return
    try:
        Tokenizer(directory)
    except ValueError as error:
        yield problem("model", str(error), "fetch the model's tokenizer again")


def _find(config: Config) -> tuple[Path, bool]:
    """The model's directory, without the network; and whether it is a name on the hub."""
    from huggingface_hub import snapshot_download

    asked = []

    def look_in_cache(name: str, **_: object) -> str:
        asked.append(name)
        return snapshot_download(name, local_files_only=True)

    try:
        model = resolve_model(config.model, weights=True, download=look_in_cache)
    except ValueError:
        model = config.model
    return model.directory, bool(asked)


def _download_size(config: Config, config_file: Path) -> str:
    """What it takes, and whether the disk has it."""
    place = next(each for each in config.model.directory.parents if each.exists())
    free = shutil.disk_usage(place).free
    try:
        plan = plan_deployment(config, find_architecture(config, config_file)[0])
    except ValueError:
        return f"or change model.path ({free / GIB:.0f} GiB are free in {place})"
    size = plan.parameters * plan.value_bytes
    enough = "" if free > size else ", which is not enough"
    return f"about {size / GIB:.1f} GiB; {free / GIB:.0f} GiB are free in {place}{enough}"


def _wrong_tensors(directory: Path, architecture: Architecture) -> str:
    """Why the weights cannot be loaded; empty when they can."""
    try:
        check_tensors(directory, architecture)
    except ValueError as error:
        return str(error)
    return ""


def check_memory(config: Config, config_file: Path) -> Iterator[Finding]:
    """What `plan` computes, against the memory that is here."""
    try:
        architecture, _ = find_architecture(config, config_file)
    except ValueError as error:
        yield problem("memory", f"not known: {error}", "see what is said of the model")
        return
    if (memory := host_memory()) is None:
        yield warning("memory", "this system does not say how much it has", "see that it is enough")
        return
    total, available = memory
    device_bytes = None
    if config.parallel.device != "cpu":
        device_bytes = _smallest_device()
    if device_bytes is not None:
        here = structs.replace(
            config.hardware, device_memory_gb=device_bytes / GIB, host_memory_gb=total / GIB
        )
        config = structs.replace(config, hardware=here)
    plan = plan_deployment(config, architecture)
    for said in plan.problems:
        yield problem("memory", said, "see `fastserve-mega plan` with the same arguments")
    needed = _host_bytes(config, plan, on_device=device_bytes is not None)
    free = f"{available / GIB:.1f} of {total / GIB:.1f} are free"
    found = f"ranks here take {needed / GIB:.1f} GiB, {free}"
    remedy = "lower kv_cache.host_memory_gb or kv_cache.device_memory_gb, or use more nodes"
    if needed > total:
        yield problem("memory", found, remedy)
    elif needed > available:
        yield warning("memory", found, f"end other programs, or {remedy}")
    else:
        yield ok("memory", found)


def _smallest_device() -> int | None:
    try:
        size = python_probe(_DEVICE_BYTES)
    except ProbeError:
        return None  # told by the check of torch
    return None if size is None else int(size)


def _host_bytes(config: Config, plan: DeploymentPlan, *, on_device: bool) -> int:
    """Host memory of the ranks that run on one node, the largest first."""
    settings = config.kv_cache
    sizes = []
    for stage in plan.stages:
        block = settings.block_size * stage.kv_bytes_per_token
        size = stage.host_blocks * block
        if not on_device:
            pool = int(CPU_POOL_GB * GIB)
            if settings.device_blocks is not None:
                pool = settings.device_blocks * block
            elif settings.device_memory_gb is not None:
                pool = int(settings.device_memory_gb * GIB)
            size += stage.weight_bytes + plan.activation_bytes + pool
        sizes += [size] * sum(len(ranks) for ranks in stage.ranks)
    return sum(sorted(sizes, reverse=True)[: config.hardware.devices_per_node])
