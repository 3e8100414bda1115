"""Commands in forked children, so that imports are paid once: forked.py CASES.json, see `run_all`.

A case: `argv`; `setup`, Python code that the child runs first; `signals`, sent once `folder` has more
than `entries` entries, a quarter of a second apart. Each child's streams go to files; the results, as
JSON on stdout, are exit code, output and errors.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time


def run_all(cases):
    """The results of the cases, by name."""
    cases = {
        name: case | {"argv": [str(word) for word in case["argv"]]} for name, case in cases.items()
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(cases, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, __file__, file.name], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def child(case, streams):
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.fileno(), number)
    exec(case.get("setup", ""), {"os": os, "sys": sys, "signal": signal, "time": time})
    code = main(case["argv"])
    try:  # as the interpreter does at its end, which takes half a second
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except OSError:
        code = 120
    os._exit(code)


def run(case):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if not process:
            child(case, (out, err))
        folder = case.get("folder")
        deadline = time.monotonic() + 30
        for number in case.get("signals", ()):
            while not os.path.exists(folder) or len(os.listdir(folder)) <= case.get("entries", 0):
                if time.monotonic() > deadline or os.waitpid(process, os.WNOHANG)[0]:
                    sys.exit("the command does not go on")
                time.sleep(0.001)
            os.kill(process, getattr(signal, number))
            time.sleep(0.25)
        status = os.waitpid(process, 0)[1]
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return {"code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1]}


if __name__ == "__main__":
    import torch

    import csulora.batch.local
    import csulora.cli.correct
    import csulora.cli.estimate
    import csulora.cli.inspect  # noqa: F401
    from csulora.cli import main

    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        wanted = json.load(file)
    print(json.dumps({name: run(case) for name, case in wanted.items()}), flush=True)
