"""The run directory: what recording writes and analysis reads."""
