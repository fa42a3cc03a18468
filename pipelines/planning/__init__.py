"""Memory, FLOPs and time of a run, computed from configurations."""
