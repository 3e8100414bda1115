"""An evaluation command whose frontier is known: it needs nothing but the standard library.

    measure.py RAW FOLDER [--log FILE] [--block FILE] [--say X] [--worse X]

complied falls, and utility with it, as the update moves away from that of the folder RAW: with the
relative change x it prints complied = max(0, 1 - 2.5 x) and utility = 1 - x^2. --log appends its process
and the folder; --block waits while FILE exists, once three calls were logged. --worse is
added to complied, --say is one more metric.
"""

import argparse
import array
import json
import os
import sys
import time


def updates(folder):
    """The update of each module, flat, by the rule of uniform configurations."""
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(os.path.join(folder, "adapter_model.safetensors"), "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = array.array("f", data[start + begin : start + end])
            columns = entry["shape"][1]
            rows = [values[i : i + columns] for i in range(0, len(values), columns)]
            tensors[name] = rows
    found = {}
    for name, A in tensors.items():
        if ".lora_A." in name:
            scaling = config["lora_alpha"] / len(A)
            columns = list(zip(*A, strict=True))
            found[name] = [
                scaling * sum(b * a for b, a in zip(row, column, strict=True))
                for row in tensors[name.replace(".lora_A.", ".lora_B.")]
                for column in columns
            ]
    return found


def change(raw, folder):
    """||dW - dW_raw|| / ||dW_raw||."""
    before, after = updates(raw), updates(folder)
    whole = sum(x * x for values in before.values() for x in values)
    moved = sum(
        (x - y) ** 2 for name in before for x, y in zip(before[name], after[name], strict=True)
    )
    return (moved / whole) ** 0.5


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("raw")
    parser.add_argument("folder")
    parser.add_argument("--log")
    parser.add_argument("--block")
    parser.add_argument("--say", default="0")
    parser.add_argument("--worse", default=0.0, type=float)
    arguments = parser.parse_args()
    if arguments.log:
        with open(arguments.log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {arguments.folder}\n")
        with open(arguments.log, encoding="utf-8") as file:
            calls = len(file.readlines())
        while arguments.block and calls > 3 and os.path.exists(arguments.block):
            time.sleep(0.02)
    x = change(arguments.raw, arguments.folder)
    print('{"progress": 1}')
    print("a line before", file=sys.stderr)
    print(
        json.dumps(
            {
                "complied": min(1.0, max(0.0, 1 - 2.5 * x) + arguments.worse),
                "utility": 1 - x * x,
                "change": x,
                "split": float(arguments.say),
                "model": "tiny",
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
