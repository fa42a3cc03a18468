"""Metrics from features, with their confidence intervals."""
