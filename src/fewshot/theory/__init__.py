"""The closed forms, and what is measured of features."""
