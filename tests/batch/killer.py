"""One command, killed again and again at a random moment: killer.py OUT KILLS ARGUMENT...

Children are forked from a process that has imported everything: a kill costs no second of imports.
Prints of each child whether it was killed, and then what is in the output folder.
"""

import os
import random
import signal
import sys
import time

import torch

import csulora.batch.local
import csulora.cli.correct  # noqa: F401
from csulora.cli import main

torch.set_num_threads(1)

out, kills, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
chance = random.Random(0)
sync = os.fsync


def slow(descriptor):
    time.sleep(0.004)
    sync(descriptor)


os.fsync = slow
for _ in range(kills):
    before = len(os.listdir(out)) if os.path.exists(out) else 0
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os._exit(main(arguments))
    deadline = time.monotonic() + 60
    while (len(os.listdir(out)) if os.path.exists(out) else 0) <= before:
        if time.monotonic() > deadline:
            sys.exit("the run does not go on")
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    names = sorted(name for name in os.listdir(out) if not name.startswith("."))
    print(*names, flush=True)
