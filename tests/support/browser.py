"""A headless Chromium spoken to over its debugging pipe: real clicks, what the console says, screenshots."""

import base64
import json
import os
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATH = next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """`with Browser(folder) as b: b.open(path); b("js expression")`; b.said holds errors, warnings and requests."""

    def __init__(self, profile, dark=False, size=(1280, 900)):
        self.profile, self.dark, self.size, self.said, self.asked, self.count = profile, dark, size, [], [], 0

    def __enter__(self):
        theirs, self.out = os.pipe()
        self.into, ours = os.pipe()

        def wire():  # Chromium reads file 3 and writes file 4
            high = os.dup(theirs), os.dup(ours)
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
        flags += " --disable-background-networking --disable-component-update --disable-sync --disable-extensions"
        self.process = subprocess.Popen(
            [PATH, *flags.split(), "--remote-debugging-pipe", f"--user-data-dir={self.profile}", "about:blank"],
            preexec_fn=wire, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(ours)
        self.buffer, self.session = b"", None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        wide, tall = self.size
        self.send("Emulation.setDeviceMetricsOverride", width=wide, height=tall, deviceScaleFactor=1, mobile=False)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def send(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        """The next message; what a page says on the way is kept."""
        while b"\0" not in self.buffer:
            got = os.read(self.into, 1 << 20)
            assert got, "the browser ended"
            self.buffer += got
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.consoleAPICalled":
            self.said.append((params["type"], [a.get("value", a.get("description")) for a in params["args"]]))
        elif kind == "Runtime.exceptionThrown":
            self.said.append(("exception", params["exceptionDetails"].get("exception", {}).get("description")))
        elif kind == "Log.entryAdded":
            self.said.append((params["entry"]["level"], params["entry"]["text"]))
        elif kind == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        return message

    def open(self, path):
        self.send("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + 30
        while self("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, "the page does not finish loading"

    def __call__(self, script):
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def click(self, selector):
        """A press of the mouse in the middle of an element, as a user does it."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        self(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center', inline: 'center'}})")
        x, y = self(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text="\r")

    def screenshot(self, path):
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))
