"""All hooks at once, in whichever process this is."""

from __future__ import annotations

import logging
import os

from csulora.serving.guard import guard

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
    _use_log_of_vllm()
    from csulora.integrations.vllm import front, metrics, worker
    from csulora.integrations.vllm.admission import Admission

    admission = Admission(standing)
    front.install(admission)
    worker.install(admission)
    metrics.install(standing.config.mode)
    _done = True
    logging.getLogger("csulora.integrations.vllm").info(
        "csulora guards the adapters of process %d, mode %s", os.getpid(), standing.config.mode
    )


def _use_log_of_vllm() -> None:
    """Write csulora's lines where vLLM's go, unless somebody has set up a log for them."""
    log, of_vllm = logging.getLogger("csulora"), logging.getLogger("vllm")
    if log.handlers:
        return
    for handler in of_vllm.handlers:
        log.addHandler(handler)
    log.setLevel(of_vllm.level)
    log.propagate = of_vllm.propagate
