"""What serving stacks load of csulora: a function each, which installs its guard where one is wanted.

A module outside of the package, and nothing but the standard library before a function is called: a stack
whose plugin fails while it is imported starts without it, and so unguarded.
"""

import os
import sys


def vllm() -> None:
    """Entry point of `vllm.general_plugins`, called in every process of a server.

    Does nothing without CSULORA_CONFIG. Raises whatever keeps the guard from standing: that ends the
    process.
    """
    if "CSULORA_CONFIG" not in os.environ:
        return
    from csulora.integrations.vllm import install

    install()


def sglang() -> None:
    """Entry point of `sglang.srt.plugins`, called in every process of a server.

    Does nothing without CSULORA_CONFIG. Raises SystemExit, with a line on stderr, where the guard cannot
    stand: SGLang swallows any other exception and starts.
    """
    if "CSULORA_CONFIG" not in os.environ:
        return
    try:
        from csulora.integrations.sglang import install

        install()
    except BaseException as error:
        reason = str(error) or type(error).__name__
        print(f"csulora: error: {reason}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
