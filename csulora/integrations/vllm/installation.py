"""All hooks at once, in whichever process this is."""

from __future__ import annotations

import logging
import os
import sys

from csulora.serving.config import VARIABLE
from csulora.serving.guard import guard

_COPIED = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
_done = False


def install() -> None:
    """Guard this process as the configuration says; once, and not at all without one or in mode "off".

    Raises CsuloraError, one line, where the guard cannot stand.
    """
    global _done
    if _done:
        return
    standing = guard()
    if standing is None or standing.config.mode == "off":
        return
    _share_with_ray()
    from csulora.integrations.vllm import front, metrics, worker
    from csulora.integrations.vllm.admission import Admission

    admission = Admission(standing)
    front.install(admission)
    worker.install(admission)
    metrics.install(standing.config.mode)
    _done = True
    _say(f"csulora guards the adapters of process {os.getpid()}, mode {standing.config.mode}")


def _share_with_ray() -> None:
    """Let vLLM hand the configuration to workers that Ray starts, in other folders and on other nodes.

    It copies its own variables to them, and those that begin as this one says; it looks when it starts
    them, which is after this.
    """
    os.environ[VARIABLE] = os.path.abspath(os.path.expanduser(os.environ[VARIABLE]))
    asked = [prefix for prefix in os.environ.get(_COPIED, "").split(",") if prefix.strip()]
    if "CSULORA_" not in asked:
        os.environ[_COPIED] = ",".join([*asked, "CSULORA_"])


def _say(text: str) -> None:
    """Write to vLLM's log, as all that csulora logs from now on; to stderr while there is none yet.

    In a server's first process vLLM loads its plugins before it sets up its log.
    """
    log = logging.getLogger("csulora")
    if not log.handlers:  # nobody has set up a log for it
        log.parent = logging.getLogger("vllm")
    if log.hasHandlers() and log.isEnabledFor(logging.INFO):
        log.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)
