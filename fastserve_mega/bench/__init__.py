"""`fastserve-mega bench`: latencies and throughput of a running server under a given load."""
