"""Triton kernels for CUDA devices. Imported only where they are used: Triton may be missing."""
