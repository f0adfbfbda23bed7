"""A decoder stage for CPUs in C++, called once a step. Optional: it needs a compiler to build."""
