"""What a valid configuration is, said before torch is imported."""
