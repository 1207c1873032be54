"""Photograph the page of a running server: `python docs/images/server.py "http://127.0.0.1:8000/?text=..." server.png`.

It asks twice, and takes the picture of the second answer: at the first the server loads adapters. Chromium's own
`--screenshot` does not wait for answers, or stops the page's clock while it does.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds for an answer
ANSWERED = "!!document.querySelector('article') && !document.querySelector('[aria-busy=true]')"


class Chromium:
    """A browser without a window, told what to do over two pipes, as its DevTools protocol has it."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
        self._number, self._session = 0, {}
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Return what came of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while (answer := self._next()).get("id") != self._number:
            pass  # news, which nobody asked for
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        message = b""
        while (byte := self._reading.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("chromium ended")
            message += byte
        return json.loads(message)


@contextmanager
def chromium() -> Iterator[Chromium]:
    """Run a browser with an empty profile."""
    (its_input, ours_out), (ours_in, its_output) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [shutil.which("chromium") or "chromium", "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        command += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"]
        # it reads from descriptor 3 and writes to 4
        shell = ["bash", "-c", f'exec "$@" 3<&{its_input} 4>&{its_output}', "bash"]
        process = subprocess.Popen(
            [*shell, *command, f"--user-data-dir={profile}"],
            pass_fds=(its_input, its_output),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input), os.close(its_output)
        try:
            yield Chromium(ours_in, ours_out)
        finally:
            process.terminate()
            process.wait()


def photograph(url: str, width: int, height: int, dark: bool) -> bytes:
    """Return the page at a link as a PNG, once all tasks have answered."""
    with chromium() as browser:
        browser.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.tell("Emulation.setEmulatedMedia", features=[scheme])
        for _ in range(2):
            browser.tell("Page.navigate", url=url)
            end = time.monotonic() + PATIENCE
            while not browser.tell("Runtime.evaluate", expression=ANSWERED)["result"]["value"]:
                if time.monotonic() > end:
                    raise SystemExit(
                        f"error: no answer is shown at {url} after {PATIENCE} seconds: open it in a browser."
                    )
                time.sleep(0.1)
        return base64.b64decode(browser.tell("Page.captureScreenshot", format="png")["data"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="with ?text=, so that the page asks at once")
    parser.add_argument("path", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    said = parser.parse_args()
    said.path.write_bytes(photograph(said.url, said.width, said.height, said.dark))
