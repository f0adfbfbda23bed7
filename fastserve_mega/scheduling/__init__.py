"""The policy: a pure state machine. No torch, no sockets, no clock, no randomness, no I/O."""
