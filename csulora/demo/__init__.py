"""A small trained world to try csulora on: `csulora demo`."""
