"""Images -> class-labelled uint8 arrays -> tasks."""
