"""`vllm serve` with the endpoint plugin, over HTTP on the loopback."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from peft_mask.vllm.endpoint import FOLDER, ROUTE
from tests.vllm import models

pytestmark = pytest.mark.usefixtures("settings_of_vllm")

KEY = "secret"
MINUTES = 5 * 60  # for what must happen; only a test that fails waits for so long


class Server:
    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = {
            "host": "127.0.0.1",
            "port": self.address.rpartition(":")[2],
            "api-key": KEY,
            "served-model-name": "base",
            "worker-extension-cls": "peft_mask.vllm.MaskExtension",
            "dtype": "float32",
            "max-model-len": 128,
            "max-num-seqs": 4,
            "kv-cache-memory-bytes": 64 << 20,
            "block-size": 32,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        # what `vllm serve` runs; the build for CPUs has another name than vLLM, and that command looks for it
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self.process = subprocess.Popen(
            [*program, "--model", str(folder / "base"), "--enforce-eager", *words],
            env={**os.environ, "VLLM_PLUGINS": "peft_mask", FOLDER: str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def ask(self, route, body=None, key=KEY):
        """Return status and answer; a body is posted."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self.address + route, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=MINUTES) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def wait(self):
        for _ in range(MINUTES):
            assert self.process.poll() is None, "the server ended"
            try:
                if self.ask("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(1)
        raise TimeoutError("the server did not start")

    def tokens(self):
        found = []
        for prompt in models.PROMPTS:
            body = {"prompt": prompt, "max_tokens": models.NEW, "temperature": 0, "ignore_eos": True}
            status, answer = self.ask("/v1/completions", {"model": "base", "return_token_ids": True, **body})
            assert status == 200, answer
            found.append(answer["choices"][0]["token_ids"])
        return found


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with open(tmp_path_factory.mktemp("server") / "log", "w+") as log:
        started = Server(folder, log)
        try:
            started.wait()
            yield started
        finally:
            started.process.terminate()
            started.process.wait(MINUTES)
            log.seek(0)
            print(log.read()[-4000:])  # pytest shows it if something failed


def test_a_running_server_is_switched_and_says_what_is_in_force(server, expected):
    status, report = server.ask(ROUTE)
    assert (status, report["adapter"]) == (200, None)
    assert {*models.MASKS, "damaged"} <= {*report["adapters"]}
    for name in ("a", "b", None, "c", "a", None):
        status, report = server.ask(ROUTE, {"adapter": name})
        assert (status, report["adapter"]) == (200, name)
        assert server.tokens() == expected[name or "base"]
        assert server.ask(ROUTE) == (200, report)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"adapter": "unknown"}, 404, "has no folder of that name"),
        ({"adapter": "../base"}, 404, "names are of up to 128"),
        ({"adapter": "damaged"}, 422, "checksum is wrong"),
        ({"adapter": "foreign"}, 422, "not the one it was trained on"),
        ({"adapter": "lora"}, 422, "of type LORA"),
        ({"adapter": 7}, 400, "a request is"),
        ({"adapter": "a", "more": 1}, 400, "a request is"),
        (b"{", 400, "a request is"),
        (b" " * 5000, 400, "at most 4096 bytes"),
    ],
)
def test_bad_requests_are_answered_in_words_and_change_nothing(server, expected, body, status, reason):
    assert server.ask(ROUTE, {"adapter": "c"})[0] == 200
    answered, report = server.ask(ROUTE, body)
    assert answered == status
    assert reason in report["error"]
    assert server.ask(ROUTE)[1]["adapter"] == "c"
    assert server.tokens() == expected["c"]


def test_the_api_key_guards_switching(server):
    assert server.ask(ROUTE, key=None)[0] == 401
    assert server.ask(ROUTE, {"adapter": "a"}, key="wrong")[0] == 401


def test_answers_under_load_are_of_one_mask_from_beginning_to_end(server, expected):
    assert server.ask(ROUTE, {"adapter": "a"})[0] == 200
    answers, ended = [], threading.Event()

    def client():
        while not ended.is_set():
            answers.append(server.tokens())

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in ("b", "a", "b", None, "b"):
        assert server.ask(ROUTE, {"adapter": name})[0] == 200
    ended.set()
    for thread in threads:
        thread.join(MINUTES)
    right = [{str(expected[name][place]) for name in ("a", "b", "base")} for place in range(len(models.PROMPTS))]
    assert answers
    for tokens in answers:
        assert [str(each) in all_right for each, all_right in zip(tokens, right, strict=True)] == [True] * len(right)
    assert server.tokens() == expected["b"]
