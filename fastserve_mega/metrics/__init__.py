"""Prometheus metrics, fed from events and plans; docs/metrics.md lists them.

What vLLM measures too has vLLM's name, with `fastserve_` for `vllm:`.
"""

from fastserve_mega.metrics.serving import ServingMetrics

__all__ = ["ServingMetrics"]
