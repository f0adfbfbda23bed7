"""The commands of `fastserve-mega`, one module each; each imports its own layer when it runs.

So a coordinator never loads torch, a worker no HTTP server, and `--help` nothing at all. The
configuration is read before that: a mistake in it is told at once.
"""
