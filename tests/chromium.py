"""Headless Chromium, driven over its debugging pipe (Chrome DevTools Protocol), which needs no package."""

import fcntl
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"),
)


class Browser:
    """Headless Chromium with one tab; ``noise`` collects what went wrong since the last ``open``."""

    def __init__(self, program: str, base: str, profile: Path):
        self.base, self.noise, self.count, self.buffer, self.session = base, [], 0, b"", {}
        (down, self.down), (self.up, up) = os.pipe(), os.pipe()
        # Chromium reads from 3 and writes to 4: bash puts the pipes there, from numbers too high to collide.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 64) for end in (down, up)]
        command = ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", program, *OPTIONS]
        command += [f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=ends, stderr=subprocess.DEVNULL, start_new_session=True)
        for end in (down, up, *ends):
            os.close(end)
        tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def wait(self, wanted) -> dict:
        """The next message for which ``wanted(message)`` holds; the events before it are listened to."""
        until = time.monotonic() + 60
        while True:
            while b"\0" not in self.buffer:
                if not select.select([self.up], [], [], max(0, until - time.monotonic()))[0]:
                    raise TimeoutError("Chromium does not answer")
                part = os.read(self.up, 1 << 20)
                if not part:
                    raise ConnectionError("Chromium has ended")
                self.buffer += part
            text, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(text)
            self.listen(message.get("method"), message.get("params", {}))
            if wanted(message):
                return message

    def listen(self, method: str | None, event: dict) -> None:
        entry, response = event.get("entry", {}), event.get("response", {})
        url = (entry or response or event.get("request", {})).get("url", "")
        if url.endswith("/favicon.ico"):
            return  # the browser asks for it, not the page
        if method == "Runtime.exceptionThrown":
            self.noise.append(event["exceptionDetails"]["exception"].get("description"))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.noise.append(f"console: {[argument.get('value') for argument in event['args']]}")
        elif method == "Log.entryAdded" and entry["level"] == "error":
            self.noise.append(f"log: {entry['text']} {url}")
        elif method == "Network.requestWillBeSent":
            if not url.startswith((self.base, "data:", "blob:")):
                self.noise.append(f"request to elsewhere: {url}")
        elif method == "Network.responseReceived" and response["status"] >= 400:
            self.noise.append(f"{response['status']}: {url}")
        elif method == "Network.loadingFailed" and not event.get("canceled"):
            self.noise.append(f"request failed: {event['errorText']}")

    def ask(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.down, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda message: message.get("id") == self.count)
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, script: str):
        """Value of a JavaScript expression in the page; a promise is awaited."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"]["description"]
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        self.evaluate(f"new Promise(d => {{ const f = () => {condition} ? d() : requestAnimationFrame(f); f() }})")

    def open(self, address: str) -> None:
        """Load ``address`` of the book; returns when its scripts have run and its formulas stand."""
        self.noise = []
        self.ask("Page.navigate", url=self.base + address)
        self.wait(lambda message: message.get("method") == "Page.loadEventFired")
        self.evaluate("window.MathJax?.startup?.promise?.then(() => null)")
        self.evaluate("document.head.insertAdjacentHTML('beforeend', '<style>*{transition: none !important}</style>')")

    def close(self) -> None:
        os.close(self.down)  # Chromium ends with its pipe
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.up)
