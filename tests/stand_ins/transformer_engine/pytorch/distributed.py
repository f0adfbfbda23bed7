class CudaRNGStatesTracker:
    """Of dropout, which nothing here uses."""
