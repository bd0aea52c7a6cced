"""One trained model tested on many datasets, with other numbers of ways and shots than it was trained with."""
