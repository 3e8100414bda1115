"""The options of commands about serving: what is signed, what is checked, and which server is asked."""

from __future__ import annotations

from typing import Any

STACKS = ("vllm", "sglang")


def add_keys(parser: Any) -> None:
    """What `csulora sign` accepts."""
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="an output, or a folder that holds some"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", metavar="PRIVATE.pem", help="the private key to sign with")
    which.add_argument(
        "--new-key", metavar="NAME", help="make a pair of keys instead: NAME.pem and NAME.pub"
    )


def add_check(parser: Any) -> None:
    """What `csulora serve-check` accepts."""
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER",
        help="an adapter folder, a folder of adapters, or a quoted pattern (default: the folders of the "
        "configuration)",
    )
    parser.add_argument(
        "--stack", choices=STACKS, default="vllm", help="what serves (default: vllm)"
    )
    group = parser.add_argument_group("folders, before a server starts")
    add_guard(group)
    group = parser.add_argument_group("a running server")
    group.add_argument(
        "--url", metavar="http://HOST:PORT", help="ask it to load an adapter that must be refused"
    )
    group.add_argument(
        "--api-key-env", metavar="NAME", help="the environment variable that holds the server's key"
    )
    group.add_argument(
        "--canary-dir",
        metavar="DIR",
        help="where that adapter is written for the moment, readable by the server (default: a "
        "temporary folder)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="to wait for an answer (default: 60)",
    )


def add_guard(parser: Any) -> None:
    """Which guard it is about."""
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        help="of the guard (default: the one that CSULORA_CONFIG names)",
    )
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        metavar="N",
        help="that the server is started with (default: that of the configuration, else no limit)",
    )
