"""What a conversion decided, as data."""
