"""What an analysis found, in memory and in the run directory."""
