"""From snapshots to estimates, trajectories and transitions."""
