"""The OpenAI-compatible HTTP server: a ZeroMQ client of the coordinator, and nothing else."""
