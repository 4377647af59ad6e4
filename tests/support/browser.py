"""A real headless Chromium for tests, spoken to over its DevTools protocol; `BROWSER` is None where there is none."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

from websockets.sync.client import connect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The middle of an element, brought into view; null while it is missing, empty or covered by another.
WHERE = """element => {
  if (!element) return null;
  element.scrollIntoView({block: 'center', behavior: 'instant'});
  const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
  const front = box.width && box.height ? document.elementFromPoint(x, y) : null;
  return front && element.contains(front) ? [x, y] : null;
}"""


class Browser:
    """One page at a time. events: all that the browser told, as (method, parameters)."""

    def __init__(self, profile: Path) -> None:
        self.events = []
        self._number = 0
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = self._wait_for(profile / "DevToolsActivePort").split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None, ping_interval=None)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, page: Path | str, width: int, scheme: str = "light") -> None:
        """page: a file or an address."""
        # A page that is open may hang when its size changes.
        self.call("Page.navigate", url="about:blank")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=850, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 60):
        """What the expression gives as soon as that is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"the page never came to: {expression}"
            time.sleep(0.1)
        return value

    def click(self, element: str, seconds: float = 60) -> None:
        """Clicks with the mouse on the middle of what the expression finds, once it is there, stands still and is in front."""
        before, end = None, time.monotonic() + seconds
        while True:
            place = self.evaluate(f"({WHERE})({element})")
            if place and place == before:
                break
            assert time.monotonic() < end, f"the page never had in front: {element}"
            before = place
            time.sleep(0.1)
        mouse = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **mouse)

    def type(self, text: str) -> None:
        """Types into what has the focus, key by key."""
        for letter in text:
            self.call("Input.dispatchKeyEvent", type="char", text=letter)

    def press(self, key: str, code: int, modifiers: int = 0, **more) -> None:
        """Presses a key that writes nothing, or a chord. code: Windows' number of it. modifiers: 1 Alt, 2 Control, 8 Shift."""
        for kind in ("rawKeyDown", "keyUp"):
            named = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            self.call("Input.dispatchKeyEvent", type=kind, **named, **(more if kind == "rawKeyDown" else {}))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                return answer["result"]
            self.events.append((answer["method"], answer["params"]))

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(timeout=20)

    def _wait_for(self, path: Path) -> str:
        end = time.monotonic() + 60
        while not (path.is_file() and path.read_text().strip()):
            assert time.monotonic() < end, "the browser did not start"
            time.sleep(0.1)
        return path.read_text()
