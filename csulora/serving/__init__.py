"""What a serving stack asks before it takes an adapter, and the cache of corrected adapters behind it."""
