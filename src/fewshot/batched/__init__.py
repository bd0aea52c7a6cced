"""The second engine: the same numbers, faster. A reader of the paper may skip it."""
