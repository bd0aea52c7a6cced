"""One file for each source of images; its function takes their size and channels, and the cache folder or None."""
