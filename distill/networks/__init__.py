"""Parts that are added to a network or follow it: adapters, averages, heads, learned weights."""
