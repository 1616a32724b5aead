"""Models onto the hub: `huggingface_hub` against a hub of a few lines, on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_right"


@dataclass
class Hub:
    """What was sent, and how to answer: ``commits`` has files by name and revision."""

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    refused: int | None = None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _say(self, status: int, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _known(self) -> bool:
            known = self.headers["Authorization"] == f"Bearer {TOKEN}"
            if not known:
                self._say(401, {"error": "Invalid credentials"})
            return known

        def do_GET(self) -> None:
            if self._known():
                found = "whoami" in self.path
                self._say(200 if found else 404, {"name": "me", "type": "user"} if found else {"error": "not found"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if not self._known():
                return
            *_, kind, revision = self.path.split("?")[0].split("/")
            if "repos/create" in self.path:
                if hub.refused:
                    answer = {"error": "You have no rights here", "url": f"{hub.address}/me/made"}
                    return self._say(hub.refused, answer)
                hub.created.append(json.loads(body))
                owner = hub.created[-1].get("organization") or "me"
                return self._say(200, {"url": f"{hub.address}/{owner}/{hub.created[-1]['name']}"})
            if kind == "branch":
                hub.branches.append(revision)
                return self._say(200, {})
            if kind == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]
                return self._say(200, {"files": modes})
            if kind != "commit":  # the card is looked at, for one
                return self._say(200, {})
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            hub.commits.append((revision, {one["path"]: base64.b64decode(one["content"]) for one in sent}))
            address = f"{hub.address}/me/made"
            return self._say(200, {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40})

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    own = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(own))
    own.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield own
    server.shutdown()
    thread.join()
    server.server_close()


def moesaic(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """The command line in a process of its own: where the hub is, is read once."""
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"}
    own = {name: value for name, value in os.environ.items() if name not in offline}
    command = [sys.executable, "-m", "moesaic", *map(str, arguments)]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout, done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_conversion_can_be_sent_as_it_is_made(tiny: Callable[[str], Path], hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hub")}
    options = ["--method", "mlpmoe", "--push-to-hub", "me/made@v1"]
    code, printed, err = moesaic("convert", tiny("llama"), out, *options, **own)
    assert code == 0, err
    assert f"{hub.address}/me/made" in err
    assert "next: moesaic eval" in printed
    (revision, sent), *others = hub.commits
    assert not others
    assert revision == "v1"
    assert sent == files_of(out)
    assert hub.created[0]["name"] == "made"


def test_a_folder_or_a_file_is_sent_to_a_branch(tiny: Callable[[str], Path], hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "own.gguf").write_bytes(b"GGUF and more")
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hub")}
    code, printed, err = moesaic("push", tmp_path / "own.gguf", "made@q8", **own)
    assert code == 0, err
    assert printed.strip() == f"{hub.address}/me/made/tree/q8"
    assert hub.commits == [("q8", {"own.gguf": b"GGUF and more"})]
    assert hub.branches == ["q8"]
    assert hub.created[0].get("visibility", "public") == "public"
    (tiny("llama") / ".hidden").write_text("mine")
    try:
        code, _, err = moesaic("push", tiny("llama"), "me/made", **own)
    finally:
        (tiny("llama") / ".hidden").unlink()
    assert code == 0, err
    assert hub.commits[1][1] == files_of(tiny("llama"))


@pytest.mark.parametrize(
    ("environment", "refused", "code", "message"),
    [
        ({}, None, 1, "there is no token of the hub on this machine"),
        ({"HF_TOKEN": "hf_wrong"}, None, 1, "the hub does not know the token"),
        ({"HF_TOKEN": TOKEN}, 403, 1, "the token may not write to me/made"),
        ({"HF_TOKEN": TOKEN}, 409, 0, ""),
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, None, 1, "the hub is switched off by HF_HUB_OFFLINE"),
        ({"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, None, 4, "the hub cannot be reached"),
    ],
)
def test_what_cannot_be_sent_is_one_line(
    environment: dict[str, str], refused: int | None, code: int, message: str, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    hub.refused = refused
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hub")} | environment
    found, _, err = moesaic("push", tmp_path / "own.gguf", "me/made", "--quiet", **own)
    assert found == code, err
    if code:
        assert not hub.commits
        error, hint = err.strip().splitlines()
        assert error.startswith(f"error: {message}")
        assert hint.startswith("hint: ")


def test_a_conversion_that_could_not_be_sent_is_refused_before_it_begins(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    own = {"HF_HOME": str(tmp_path / "hub")}
    names = {
        "made": "'made' names no owner",
        "me/made": "there is no token",
        "me/made-": "is no name of",
        "me/m.git": "is no name of",
    }
    for name, message in names.items():
        code, _, err = moesaic("convert", tiny("llama"), tmp_path / "out", "--push-to-hub", name, **own)
        assert code == 1
        assert message in err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def test_a_name_is_looked_at_before_token_and_files(tmp_path: Path) -> None:
    own = {"HF_HOME": str(tmp_path / "hub")}
    for name, message in {
        "made": "names no owner",
        "me/made/more": "is no name of",
        "me/m.git": "is no name of",
    }.items():
        code, _, err = moesaic("push", tmp_path / "nowhere", name, **own)
        error, hint = err.strip().splitlines()
        assert code == 1
        assert error.startswith(f"error: {name!r} {message}")
        assert hint == "hint: give OWNER/NAME"


def test_other_files_than_were_written_are_not_sent(tiny: Callable[[str], Path], hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hub")}
    assert moesaic("convert", tiny("llama"), out, "--method", "mlpmoe", "--quiet")[0] == 0
    (out / "blueprint.json").write_text("{}")
    code, _, err = moesaic("push", out, "me/made", **own)
    assert code == 3, err
    assert not hub.commits


def test_a_folder_that_transformers_saved_over_a_conversion_is_sent(
    tiny: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    from moesaic.nn.modeling_moesaic import MoesaicForCausalLM

    out = tmp_path / "out"
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hub")}
    assert moesaic("convert", tiny("llama"), out, "--method", "mlpmoe", "--quiet")[0] == 0
    MoesaicForCausalLM.from_pretrained(out, dtype="auto").save_pretrained(out)
    code, _, err = moesaic("push", out, "me/made", **own)
    assert code == 0, err
    assert hub.commits[0][1] == files_of(out)
