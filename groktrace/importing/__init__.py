"""Make a run of checkpoints that a training without the hook has left."""
