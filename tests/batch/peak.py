"""One command in a process of its own, and the most memory it had: peak.py ARGUMENT..."""

import resource
import sys

import torch

from csulora.cli import main

torch.set_num_threads(1)
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
