"""Asking a server whether a guard stands in it; a small server of our own answers as the real ones do."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import builders
import pytest
from safetensors.torch import load_file

import csulora
from csulora.serving import canary
from csulora.serving.canary import ask


class Server:
    """What was asked, and what is answered: (status, body) by path, or a function of the request."""

    def __init__(self, answers):
        self.answers, self.asked, self.headers = answers, [], []

    def answer(self, path, content, headers):
        self.asked.append((path, content))
        self.headers.append(dict(headers))
        found = self.answers.get(path, (404, {"detail": "Not Found"}))
        return found(content) if callable(found) else found


@contextmanager
def serving(answers):
    """A running server and its address."""
    server = Server(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = server.answer(self.path, content, self.headers)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", body["to"])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(OSError):  # whoever asked may be gone
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", server
        finally:
            http.shutdown()
            thread.join()


def by_vllm(text, status):
    return lambda content: (
        status,
        {"error": {"message": text.format(**content), "type": "BadRequestError", "code": status}},
    )


def by_sglang(text):
    return lambda content: (
        400,
        {"success": False, "error_message": text.format(**content), "loaded_adapters": {}},
    )


REFUSED = "csulora refused {lora_name}: {lora_path}: rank"
VLLM, SGLANG = canary.ENDPOINTS["vllm"], canary.ENDPOINTS["sglang"]


def test_the_endpoints_are_those_of_the_stacks():
    assert VLLM == ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    assert SGLANG == ("/load_lora_adapter", "/unload_lora_adapter")


@pytest.mark.parametrize(
    ("stack", "answer"), [("vllm", by_vllm(REFUSED, 422)), ("sglang", by_sglang(REFUSED))]
)
def test_a_guard_is_known_by_its_text(stack, answer):
    with serving({canary.ENDPOINTS[stack][0]: answer}) as (url, server):
        probe = ask(url + "/", stack)
    assert probe.ok and probe.found == "guarded"
    assert probe.text.startswith("refused the canary (4") and "csulora refused" in probe.text
    ((_, content),) = server.asked
    assert content.keys() == {"lora_name", "lora_path"}
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(("stack", "paths"), [("vllm", VLLM), ("sglang", SGLANG)])
def test_a_server_that_loads_it_has_no_guard_and_unloads_it_again(stack, paths):
    with serving({paths[0]: (200, b"Success"), paths[1]: (200, {"success": True})}) as (
        url,
        server,
    ):
        probe = ask(url, stack)
    assert not probe.ok and probe.found == "loaded"
    assert "no guard stands there" in probe.text and "unloaded again" in probe.text
    (_, loaded), (path, unloaded) = server.asked
    assert path == paths[1] and unloaded == {"lora_name": loaded["lora_name"]}


def test_a_canary_that_stays_loaded_is_named():
    with serving({VLLM[0]: (200, b"Success"), VLLM[1]: (500, b"broken")}) as (url, server):
        probe = ask(url)
    name = server.asked[0][1]["lora_name"]
    assert f"{name} is still loaded" in probe.text and "broken" in probe.text


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (by_vllm("expected target modules in ... but received", 500), "is not known"),
        (by_vllm("csulora refused other: rank", 422), "is not known"),
        ((404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ((401, {"error": "Unauthorized"}), "--api-key-env"),
        ((302, {"to": "http://127.0.0.1:9/"}), "the address that it leads to"),
        ((500, b"\xff\xfe <html>"), "is not known"),
        ((500, b'{"error": {"message": 7}}'), "is not known"),
        ((500, b"[" * 100_000), "is not known"),
    ],
)
def test_whatever_else_refuses_proves_nothing(answer, text):
    with serving({VLLM[0]: answer}) as (url, server):
        probe = ask(url)
    assert not probe.ok and probe.found == "refused"
    assert "not by csulora" in probe.text and text in probe.text
    assert "\n" not in probe.text and len(probe.text) < 5000
    assert len(server.asked) == 1


def test_a_success_with_the_text_of_a_refusal_is_none():
    with serving({VLLM[0]: lambda c: (200, REFUSED.format(**c).encode())}) as (url, _):
        assert ask(url).found == "loaded"


def test_no_answer_is_no_guard(tmp_path):
    with serving({}) as (url, _):
        pass  # nobody listens there any more
    probe = ask(url, timeout=5)
    assert not probe.ok and probe.found == "silent" and "refused" in probe.text


def test_a_server_that_does_not_answer_in_time_is_silent():
    wait = threading.Event()

    def slow(_):
        wait.wait(30)
        return 200, b""

    with serving({VLLM[0]: slow}) as (url, _):
        try:
            assert ask(url, timeout=0.2).found == "silent"
        finally:
            wait.set()


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving({VLLM[0]: by_vllm(REFUSED, 422)}) as (other, elsewhere):
        answers = {VLLM[0]: lambda c: (307, {"to": other + VLLM[0]})}
        with serving(answers) as (url, server):
            assert ask(url, api_key="secret").found == "refused"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert elsewhere.asked == []


def test_the_canary_is_what_a_guard_refuses_and_leaves_nothing(tmp_path):
    seen = {}

    def look(content):
        folder = Path(content["lora_path"])
        seen["parent"], seen["mode"] = folder.parent, folder.stat().st_mode & 0o777
        seen["modes"] = {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()}
        seen["tensors"] = load_file(folder / builders.WEIGHTS)
        seen["config"] = json.loads((folder / builders.CONFIG).read_text())
        with pytest.raises(csulora.CsuloraError, match="do not fit rank 1"):
            csulora.LoraAdapter.load(folder)
        return by_vllm(REFUSED, 422)(content)

    with serving({VLLM[0]: look}) as (url, _):
        assert ask(url, folder=tmp_path).ok
    assert seen["parent"] == tmp_path and list(tmp_path.iterdir()) == []
    assert seen["mode"] == 0o755 and set(seen["modes"].values()) == {0o644}
    assert seen["modes"].keys() == {builders.WEIGHTS, builders.CONFIG}
    A, B = (seen["tensors"][name] for name in builders.lora_names(canary.MODULE))
    assert A.shape[0] == B.shape[1] == 2 != seen["config"]["r"]
    assert not B.any()  # harmless where it is loaded


def test_each_canary_has_a_name_of_its_own():
    with serving({VLLM[0]: by_vllm(REFUSED, 422)}) as (url, server):
        assert ask(url).ok and ask(url).ok
    assert len({content["lora_name"] for _, content in server.asked}) == 2


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://h", "file:///etc/passwd", "http://", "http://h/?q=1", ""]
)
def test_an_address_that_is_none_is_a_wrong_call(url):
    with pytest.raises(csulora.UsageError, match="must be the address of a server"):
        ask(url)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(csulora.CsuloraError, match="missing: cannot be written"):
        ask("http://127.0.0.1:9", folder=tmp_path / "missing")
