"""What a run leaves: scores with their intervals, metrics.csv, results.json, the figures of one run."""
