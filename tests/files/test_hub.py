"""Hub ids against servers that accept a connection and then say nothing, and mistyped paths."""

import json
import os
import re
import socket
import subprocess
import sys
import threading

import builders
import pytest

from csulora import CsuloraError
from csulora.files import hub

COMMIT = "a" * 40
LISTING = [{"type": "file", "path": builders.CONFIG, "size": 9, "oid": "b" * 40}]


class Server:
    """Accepts connections and answers what `answers` knows a reply to; other requests wait for ever."""

    def __init__(self, answers):
        self.answers, self.asked, self.kept = answers, [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.kept.append(connection)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with connection.makefile("rb") as lines:
            while request := lines.readline().decode():
                self.asked.append(request.split()[1])
                while lines.readline().strip():
                    pass
                for pattern, value in self.answers.items():
                    if re.match(pattern, self.asked[-1]):
                        body = json.dumps(value).encode()
                        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                        connection.sendall(head.encode() + body)
                        break

    def close(self):
        for connection in [self.listener, *self.kept]:
            connection.close()


@pytest.fixture
def serve():
    servers = []

    def start(answers):
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def silent(serve, tmp_path, monkeypatch):
    """A hub that never answers, and an empty cache."""
    from huggingface_hub import constants

    server = serve({})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_last", None)
    monkeypatch.setenv(hub.VARIABLE, "0.4")
    return server


def refusal(name):
    with pytest.raises(CsuloraError) as caught:
        hub.resolve_source(name, ["*"])
    return str(caught.value)


def test_a_silent_hub_is_given_up_and_others_fail_at_once(silent):
    reason = (
        f"no such folder, and not to be had from the hub ({silent.address}: no answer in 0.4 s)"
    )
    assert refusal("org/one") == f"org/one: {reason}"
    asked = len(silent.kept)
    for name in ("org/two", "three"):
        assert refusal(name) == f"{name}: {reason}"
    assert len(silent.kept) == asked > 0  # the hub was not asked again


def test_what_the_cache_holds_needs_no_hub(silent, tmp_path):
    place = tmp_path / "cache" / "models--org--one"
    builders.write_adapter(place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    for _ in range(2):
        assert hub.resolve_source("org/one", ["*"]) == place / "snapshots" / COMMIT


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_the_time_to_wait_is_a_number(silent, monkeypatch, value):
    monkeypatch.setenv(hub.VARIABLE, value)
    assert hub.VARIABLE in refusal("org/one") and value in refusal("org/one")
    assert not silent.kept


def test_a_slow_download_goes_on(tmp_path, monkeypatch, silent):
    """Longer than the limit in all, but never as long without a byte."""
    import huggingface_hub

    folder = tmp_path / "cache" / "models--org--one"

    def drip(name, **options):
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / "blob").write_bytes(bytes(i + 1))
            threading.Event().wait(0.1)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", drip)
    assert hub.resolve_source("org/one", ["*"]) == folder


def test_a_mistyped_path_is_not_sought_on_the_hub(silent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    for name in ("adapters/typo", "adapters/a/b", "../x", "", "a\0b", "x/" * 3000):
        assert refusal(name) == f"{name}: no such folder"
    assert not silent.kept


def test_a_hub_that_falls_silent_holds_up_neither_the_run_nor_its_end(serve, tmp_path, subspace):
    """It lists the files and sends none: those who fetch them stay behind in threads of a pool."""
    info = {"id": "org/x", "sha": COMMIT, "siblings": [{"rfilename": builders.CONFIG}], "tags": []}
    server = serve({"/api/models/.*/tree/": LISTING, "/api/models/": info, "/api/": {}})
    environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf")}
    environment |= {hub.VARIABLE: "1", "HF_HUB_OFFLINE": "0"}
    command = ["correct", "org/x", "org/y", "org/z", "--subspace", subspace, "--out-dir", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "csulora", *map(str, command)],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [line for line in done.stderr.splitlines() if "csulora: failed:" in line]
    assert done.returncode == 1 and len(lines) == 3, done.stderr
    assert all(f"{server.address}: no answer in 1 s" in line for line in lines)
    assert any("/resolve/" in path for path in server.asked)
