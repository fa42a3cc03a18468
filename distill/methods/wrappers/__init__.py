"""Methods around another method."""
