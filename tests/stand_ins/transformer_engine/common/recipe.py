class DelayedScaling:
    """Of FP8, which nothing here uses."""
