"""The systems of the experiments: the shipped deployments, with the memory the figures are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastserve_mega.simulator.config import SimulationConfig, load_simulation_config

CONFIGS = Path(__file__).parent / "configs"

# KV blocks that 0.9 of a device leaves beside the matrices of the model and 1 GiB for activations,
# CUDA context and workspaces, as in the authors' scripts (their prototype was seen with 912 for
# OPT-13B). `fastserve-mega plan` reckons with norms, biases and a step's own activations, and comes
# to 882, 464 and 3,221.
SETTINGS = {
    "opt-13b-a100": ("kv_cache.device_blocks=906",),
    "opt-66b-4xa100": ("kv_cache.device_blocks=500",),
    "opt-175b-16xa100": ("kv_cache.device_blocks=3322",),
    "llama-3-8b-a100": ("kv_cache.device_blocks=10262",),
    # Short chunks, which keep the time between two tokens low.
    "llama-3-8b-h200": (
        "kv_cache.device_blocks=52340",
        "kv_cache.host_memory_gb=56",
        "scheduler.max_batch_tokens=512",
    ),
}
"""By deployment: what the experiments set."""


def load_system(name: str, workload: str, overrides: Sequence[str] = ()) -> SimulationConfig:
    """Load a shipped deployment under a shipped workload.

    Args:
        name: of the deployment.
        workload: its name.
        overrides: of either, as for `fastserve-mega simulate --set`; they come last.

    Raises:
        ValueError: there is no such file, or an override is not valid.
    """
    paths = CONFIGS / f"{name}.yaml", CONFIGS / "workloads" / f"{workload}.yaml"
    for path in paths:
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml")))
            raise ValueError(f"there is no {path.name}; there are {known}")
    return load_simulation_config(*paths, (*SETTINGS.get(name, ()), *overrides))
