"""Who asks, and what is whose share."""
