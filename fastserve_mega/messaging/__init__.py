"""Wire messages, and the frames they travel in."""
