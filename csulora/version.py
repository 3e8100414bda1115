"""What made an output: the version of the package, and the number of the method."""

VERSION = "0.1.0"
# Counts up whenever the same adapter, subspace and settings give other values than before.
METHOD = 1

MADE_BY = {"version": VERSION, "method": METHOD}
