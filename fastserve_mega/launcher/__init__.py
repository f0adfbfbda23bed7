"""Starts a deployment on one machine and keeps it up: `Deployment`, `serve`, `profile`."""

from fastserve_mega.launcher.deployment import Deployment, http_url
from fastserve_mega.launcher.processes import LaunchError, mpirun_command
from fastserve_mega.launcher.profiling import profile
from fastserve_mega.launcher.supervisor import serve

__all__ = ["Deployment", "LaunchError", "http_url", "mpirun_command", "profile", "serve"]
