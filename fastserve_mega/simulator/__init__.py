"""A virtual clock around the live Scheduler: policies at scales this machine does not have."""
