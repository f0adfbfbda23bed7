"""KV memory: who has which blocks, who gives them up, and what moves between device and host."""
