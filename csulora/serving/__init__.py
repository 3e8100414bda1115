"""What a serving stack asks before it takes an adapter: configuration, cache of corrected adapters, guard."""
