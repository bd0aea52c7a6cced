"""The paper's algorithm on learn2learn's MAML, and the explicit loss."""
