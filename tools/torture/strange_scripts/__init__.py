"""Training scripts put together from strange parts, each with what it knows of itself."""
