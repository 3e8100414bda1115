"""What stands inside other programs."""
