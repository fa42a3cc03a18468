"""From scored folders to tables, plots and one page."""
