"""From an adapter to its correction: plan what is wanted, solve it on a backend, finish the form."""
