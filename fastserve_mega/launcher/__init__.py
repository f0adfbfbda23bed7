"""Deployments on one machine: `serve`, `profile`, and `temporary_deployment` for a job."""

from fastserve_mega.launcher.deployment import Deployment, http_url
from fastserve_mega.launcher.processes import LaunchError, mpirun_command, profile
from fastserve_mega.launcher.supervisor import SETTLED_S, serve
from fastserve_mega.launcher.temporary import temporary_deployment

__all__ = [
    "SETTLED_S",
    "Deployment",
    "LaunchError",
    "http_url",
    "mpirun_command",
    "profile",
    "serve",
    "temporary_deployment",
]
