"""The figures of docs/simulation.md: `python -m fastserve_mega.experiments.paper` and others."""
