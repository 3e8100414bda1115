"""Commands as JSON lists on standard input, one a line, run one after the other in this process.

Prints of each, as JSON: exit code, standard error, processor time in seconds, growth of memory in MB.
"""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

import torch

import csulora.batch  # noqa: F401  # so that it is not counted as memory of the first command
from csulora.cli import main

torch.set_num_threads(1)


def memory(name):
    line = next(x for x in Path("/proc/self/status").read_text().split("\n") if x.startswith(name))
    return int(line.split()[1]) / 1024


for text in sys.stdin:
    with contextlib.suppress(OSError):  # else the peak is that of all commands so far
        Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    errors, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
        code = main(json.loads(text))
    grown = memory("VmHWM") - before
    print(json.dumps([code, errors.getvalue(), time.process_time() - start, grown]), flush=True)
