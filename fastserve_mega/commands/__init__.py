"""The commands of `fastserve-mega`, one module per group; each imports its own layer when it runs.

The configuration is read before that, so that a mistake in it is told at once. A coordinator never loads torch, a worker no HTTP server, and `--help` nothing at all.
"""
