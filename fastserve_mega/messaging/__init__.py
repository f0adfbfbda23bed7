"""Wire messages, their codec, and the ZeroMQ channels they travel on."""
