"""Parts that are added to a network or take its output: adapters, moving averages, heads, learned weights."""
