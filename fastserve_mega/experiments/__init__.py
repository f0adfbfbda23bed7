"""Experiments to repeat: the figures of docs/simulation.md, live runs beside simulated ones."""
