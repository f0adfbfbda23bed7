"""Jobs that nobody waits for at a screen: batches of requests, and a model inside a program."""
