"""The processes of a run: ranks, their start and their end, signals, and what a process inherits."""
