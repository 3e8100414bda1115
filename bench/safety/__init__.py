"""Worlds trained from scratch in which corrections, controls and published methods are compared."""
