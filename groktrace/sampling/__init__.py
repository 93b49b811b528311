"""The tempered posterior and its samplers: numerics on stacked tensors, no files, no printing."""
