"""Runs beside each other: paired differences on the same test tasks, and which of them are larger than noise."""
