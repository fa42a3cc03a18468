"""Memory, FLOPs and time of a run, counted from configurations."""
