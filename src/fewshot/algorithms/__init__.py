"""Algorithms in one file each, as one's own may be, and how the engines call what such a file overrides."""
