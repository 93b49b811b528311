"""An open analysis: which snapshots are measured when, and by whom."""
