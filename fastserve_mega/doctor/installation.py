"""Checks of what is installed: Python, libraries, torch, Megatron and what makes it faster."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from fastserve_mega.doctor.finding import (
    Finding,
    ProbeError,
    ok,
    problem,
    python_probe,
    run_probe,
    warning,
)
from fastserve_mega.launcher import LaunchError, mpirun_command
from fastserve_mega.system.config import Config
from fastserve_mega.worker.native.library import NativeError, load_library

_DISTRIBUTION = "fastserve_mega"
_MIN_PYTHON = (3, 11)
_FOR_DEVELOPERS = {"test", "compat"}
"""Extras that nobody needs who serves; the packages of one of them are not for this environment."""
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
devices = range(torch.cuda.device_count() if cuda else 0)
properties = [torch.cuda.get_device_properties(device) for device in devices]
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "devices": [{"name": each.name, "bytes": each.total_memory} for each in properties],
}))
"""
_MEGATRON = """
import json, megatron.core
from megatron.core.models.gpt import GPTModel
print(json.dumps(megatron.core.__version__))
"""
_APEX = """
import importlib.util, json
names = ("apex.normalization", "apex.transformer")
theirs = importlib.util.find_spec("apex") is not None and any(
    importlib.util.find_spec(name) is not None for name in names)
fused = False
if theirs:
    try:
        import fused_layer_norm_cuda
        fused = True
    except ImportError:
        pass
print(json.dumps({"theirs": theirs, "fused": fused}))
"""
_TRANSFORMER_ENGINE = """
import json, transformer_engine, transformer_engine.pytorch
print(json.dumps(getattr(transformer_engine, "__version__", "of unknown version")))
"""
_MPI_TIMEOUT_S = 60.0
_MPI_LIBRARY = """
import json
from mpi4py import MPI
lines = open("/proc/self/maps").read().splitlines()
files = sorted({line.split()[-1] for line in lines if "/libmpi" in line})
print(json.dumps({"vendor": MPI.get_vendor()[0], "version": MPI.get_vendor()[1], "files": files}))
"""
_MPI_TOGETHER = "from mpi4py import MPI; print('ranks:', MPI.COMM_WORLD.Get_size(), flush=True)"
_INSTALL_MPI = "pip install 'fastserve_mega[mpi]', or a system MPI with mpi4py built for it"


def check_python() -> Iterator[Finding]:
    """Check the version of Python."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < _MIN_PYTHON:
        wanted = ".".join(map(str, _MIN_PYTHON))
        yield problem("Python", found, f"install Python {wanted} or newer")
    elif sys.platform != "linux":
        yield warning("Python", f"{found} on {sys.platform}", "only Linux is tested")
    else:
        yield ok("Python", found)


def check_libraries() -> Iterator[Finding]:
    """Each library that fastserve_mega says it needs, and the extras."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield warning("libraries", "fastserve_mega is not installed", "pip install -e .")
        return
    requirements = [Requirement(line) for line in lines]
    needed = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    wrong = [said for each in needed if (said := _shortcoming(each))]
    for said in wrong:
        yield problem("libraries", said, f"pip install '{said.split(' is ')[0]}'")
    if not wrong:
        yield ok("libraries", f"all {len(needed)} that are needed")
    missing = _missing_extras([each for each in requirements if each not in needed])
    for extra, names in missing.items():
        said = f"not there: {', '.join(names)}; optional: pip install 'fastserve_mega[{extra}]'"
        yield ok(f"extra {extra}", said)


def _shortcoming(requirement: Requirement) -> str | None:
    """What is wrong with a library, as `REQUIREMENT is …`; None when nothing is."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name}{requirement.specifier} is not installed"
    if not requirement.specifier.contains(Version(version), prereleases=True):
        return f"{requirement.name}{requirement.specifier} is needed, {version} is installed"
    return None


def _missing_extras(requirements: list[Requirement]) -> dict[str, list[str]]:
    missing: dict[str, list[str]] = {}
    extras = metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    for extra in sorted({*extras} - _FOR_DEVELOPERS):
        for each in requirements:
            belongs = each.marker is not None and each.marker.evaluate({"extra": extra})
            if belongs and not each.extras and _shortcoming(each):
                missing.setdefault(extra, []).append(each.name)
    return missing


def check_torch(config: Config | None) -> Iterator[Finding]:
    """Check that it can be imported, and sees as many devices as the configuration needs."""
    try:
        found = python_probe(_TORCH)
    except ProbeError as error:
        yield problem("torch", str(error), "pip install torch (pytorch.org says which build)")
        return
    built = f"for CUDA {found['cuda']}" if found["cuda"] else "for CPUs"
    yield ok("torch", f"{found['version']}, built {built}")
    yield from _check_devices(config, [each["name"] for each in found["devices"]], found["cuda"])


def _check_devices(
    config: Config | None, names: list[str], built_for_cuda: str | None
) -> Iterator[Finding]:
    device = config.parallel.device if config else "auto"
    if not names:
        there = Path("/dev/nvidia0").exists()
        why = "torch sees no GPU" + (" though /dev/nvidia0 is there" if there else "")
        remedy = "install the NVIDIA driver" if built_for_cuda else "install torch for CUDA"
        if device == "cuda":
            yield problem("devices", f"{why}; parallel.device is cuda", f"{remedy}, or set it auto")
        elif there or built_for_cuda:
            yield warning("devices", f"{why}: ranks will compute on the CPU", remedy)
        else:
            yield ok("devices", "no GPU: ranks compute on the CPU")
        return
    found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if config is None or device == "cpu":
        yield ok("devices", found)
        return
    needed = min(config.parallel.world_size, config.hardware.devices_per_node)
    if len(names) < needed:
        said = f"{found}; {needed} ranks on this node need one each"
        yield problem("devices", said, "use more nodes and set hardware.devices_per_node")
    else:
        yield ok("devices", found)


def check_megatron() -> Iterator[Finding]:
    """Check that it can be imported; its version is among the libraries."""
    try:
        yield ok("Megatron-Core", str(python_probe(_MEGATRON)))
    except ProbeError as error:
        yield problem("Megatron-Core", str(error), "pip install 'megatron-core>=0.16,<0.20'")


def check_apex() -> Iterator[Finding]:
    """NVIDIA's Apex, and not the package of that name on PyPI."""
    try:
        distribution = metadata.version("apex")
    except metadata.PackageNotFoundError:
        distribution = None
    found = python_probe(_APEX)
    if found["theirs"]:
        kernels = "with" if found["fused"] else "without"
        yield ok("Apex", f"NVIDIA's, {kernels} fused kernels")
    elif distribution is not None:
        said = f"the package apex {distribution} of PyPI, which has nothing to do with NVIDIA Apex"
        remedy = "pip uninstall apex; NVIDIA's is built from https://github.com/NVIDIA/apex"
        yield warning("Apex", said, remedy)
    else:
        yield ok("Apex", "not installed; optional: fused kernels on CUDA")


def check_transformer_engine() -> Iterator[Finding]:
    """Check that it works, when it is installed."""
    if not any(_installed(name) for name in ("transformer-engine", "transformer_engine_torch")):
        yield ok("Transformer Engine", "not installed; optional: faster layers on CUDA")
        return
    try:
        yield ok("Transformer Engine", str(python_probe(_TRANSFORMER_ENGINE)))
    except ProbeError as error:
        remedy = "install the build for this torch and CUDA, or uninstall it"
        yield problem("Transformer Engine", f"installed but broken: {error}", remedy)


def check_native_step() -> Iterator[Finding]:
    """That the C++ step for CPUs was built, and for which instructions it runs here."""
    try:
        found = load_library().best_instruction_set.title
    except NativeError as error:
        yield ok("native step", f"not there: {error}; optional: torch computes on CPUs")
    else:
        yield ok("native step", f"built; uses {found} here")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_mpi(config: Config | None) -> Iterator[Finding]:
    """The MPI library that mpi4py loads, mpirun, and that they are of one kind.

    One rank needs none of it, and torchrun needs no mpirun: then nothing here is a problem.
    """
    needed = config is None or config.parallel.world_size > 1
    complain = problem if needed else warning
    try:
        library = python_probe(_MPI_LIBRARY, _MPI_TIMEOUT_S)
    except ProbeError as error:
        yield complain("MPI library", f"mpi4py cannot load one: {error}", _INSTALL_MPI)
        return
    version = ".".join(map(str, library["version"]))
    found = f"{library['vendor']} {version}"
    yield ok("MPI library", f"{found}, {', '.join(library['files'])}")
    try:
        command = mpirun_command(2)
    except LaunchError:
        remedy = f"{_INSTALL_MPI}; or start the ranks with torchrun or srun"
        yield complain("mpirun", "not found", remedy)
        return
    try:
        said = run_probe([*command, sys.executable, "-c", _MPI_TOGETHER], _MPI_TIMEOUT_S)
    except ProbeError as error:
        yield complain("mpirun", f"{command[0]} cannot start two ranks: {error}", _INSTALL_MPI)
        return
    if said.count("ranks: 2") == 2:
        yield ok("mpirun", f"{command[0]} starts ranks that find each other")
    else:
        said = f"{command[0]} is not of {found}: two ranks were each alone"
        remedy = "use the mpirun of the library above, or build mpi4py for this mpirun"
        yield complain("mpirun", said, remedy)
