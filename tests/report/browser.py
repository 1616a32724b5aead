"""A page in a real browser without a window, its network switched off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no chromium, chromium-browser or google-chrome on PATH"
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run --disable-default-apps --disable-dev-shm-usage --disable-extensions "
    "--proxy-server=127.0.0.1:9 --enable-logging=stderr --v=0 --dump-dom"
)


@dataclass(frozen=True)
class Opened:
    """What came of it: the document as it is at the end, messages of its console, what it has loaded or tried to
    load beside itself, and what the test's script returned."""

    dom: str
    console: list[str]
    requests: list[str]
    found: Any


def open_page(html: str, folder: Path, script: str = "return null", width: int = 1200, dark: bool = False) -> Opened:
    """Open a page from disk and run ``script`` in it once it is ready; what that returns must be JSON.

    What a page's own policy forbids is an error of the console. A proxy that is not there keeps the browser itself, and
    pages without such a policy, from the network.
    """
    assert CHROMIUM is not None
    page = folder / "page.html"
    asked = (
        f"<script>addEventListener('load', () => {{ const made = (() => {{ {script} }})();"
        'const node = document.createElement("script"); node.type = "application/json"; node.id = "found";'
        "node.textContent = JSON.stringify([made, performance.getEntriesByType('resource').map((each) => each.name)]);"
        "document.body.append(node); });</script></body>"
    )
    page.write_text(html.replace("</body>", asked), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *_FLAGS.split(), scheme, f"--window-size={width},900"]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{page.resolve()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    (found,) = re.findall(r'<script type="application/json" id="found">(.*?)</script>', done.stdout, re.DOTALL)
    made, resources = json.loads(found)
    return Opened(done.stdout, console, resources, made)
