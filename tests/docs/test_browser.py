"""The site in a browser: no error, no request to another host, nothing wider than the screen."""

import asyncio
import base64
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = [
    "",
    "start/troubleshooting/",
    "results/headline/",
    "reference/configuration/",
    "notebooks/train_look_generate/",
]
PAGES += ["assets/report_example.html"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")]


class Seen(NamedTuple):
    """What a page did in the browser."""

    errors: list[str]
    addresses: list[str]
    width: int
    widest: str
    background: str


class Quiet(SimpleHTTPRequestHandler):
    """A handler that does not log."""

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The address of the site on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A headless browser; its address for commands."""
    folder = tmp_path_factory.mktemp("browser")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen([str(BROWSER), *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("DevTools listening on "))
    Thread(target=process.stderr.read, daemon=True).start()
    yield line.split()[-1]
    process.terminate()
    process.wait(timeout=20)


class Session:
    """A tab of the browser, commanded by its DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number, self.session, self.events = socket, 0, None, []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        await self.socket.send_json(message | ({"sessionId": self.session} if self.session else {}))
        while True:
            answer = await asyncio.wait_for(self.socket.receive_json(), 60)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")


async def look(browser: str, address: str, width: int, scheme: str, picture: Path | None) -> Seen:
    import aiohttp

    async with aiohttp.ClientSession() as client, client.ws_connect(browser, max_msg_size=0) as socket:
        tab = Session(socket)
        target = (await tab.call("Target.createTarget", url="about:blank"))["targetId"]
        tab.session = (await tab.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        await tab.call("Emulation.setDeviceMetricsOverride", **sizes)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await tab.call("Emulation.setEmulatedMedia", features=[feature])
        await tab.call("Page.navigate", url=address)
        await tab.evaluate(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )
        await tab.evaluate("new Promise(done => setTimeout(done, 500))")
        full = await tab.evaluate("document.documentElement.scrollWidth")
        widest = await tab.evaluate(WIDEST)
        background = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
        if picture is not None:
            shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=False)
            picture.write_bytes(base64.b64decode(shot["data"]))
        tab.session = None
        await tab.call("Target.closeTarget", targetId=target)
        return Seen(errors_of(tab.events), addresses_of(tab.events), full, widest, background)


# The first element that reaches out of the screen and is not in one that scrolls.
WIDEST = """
[...document.querySelectorAll('body *')].filter(each => {
  const box = each.getBoundingClientRect()
  if (box.width === 0 || box.right <= innerWidth + 1) return false
  for (let up = each; up; up = up.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(up).overflowX)) return false
  return true
}).slice(0, 3).map(each => each.outerHTML.slice(0, 200)).join('\\n')
"""


def errors_of(events: list[dict[str, Any]]) -> list[str]:
    found = []
    for event in events:
        if event.get("method") == "Runtime.exceptionThrown":
            found.append(str(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"):
            found.append(str(event["params"]["args"]))
        elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
            found.append(str(event["params"]["entry"]))
    return found


def addresses_of(events: list[dict[str, Any]]) -> list[str]:
    return [each["params"]["request"]["url"] for each in events if each.get("method") == "Network.requestWillBeSent"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("page", PAGES)
def test_pages_load_without_errors_and_fit(browser: str, address: str, page: str, width: int, scheme: str) -> None:
    folder = os.environ.get("MOT_SCREENSHOTS")
    name = f"{page.strip('/').replace('/', '_') or 'index'}_{width}_{scheme}.png"
    seen = asyncio.run(look(browser, address + page, width, scheme, Path(folder, name) if folder else None))
    assert not seen.errors
    assert seen.addresses
    assert [each for each in seen.addresses if not each.startswith((address, "data:"))] == []
    assert seen.width <= width, seen.widest
    red, green, blue = (int(part) for part in seen.background[4:-1].replace("(", "").split(",")[:3])
    assert (red + green + blue > 600) is (scheme == "light"), seen.background
