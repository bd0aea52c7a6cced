"""MAML with and without the zeroing trick."""
