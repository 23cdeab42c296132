"""A server on loopback that plays the part of W&B for the real clients, and records what it is sent."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.dashboards.wandb_answers import ENTITY, Answers


class WandbStub(Answers):
    """``with WandbStub() as stub``: listens on a free port of 127.0.0.1 until the block ends.

    Attributes:
        requests: Method and path of every request.
        url: Where it listens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self._uploads: dict[str, bytes] = {}
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbStub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables for a process that is to talk to this server alone and to write below ``folder`` alone.

        Proxies lead here as well, so that a request to any other host shows up in ``escaped`` and goes no further.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        kinds = ("ARTIFACT", "CACHE", "CONFIG", "DATA")
        return {
            **{name: value for name, value in kept.items() if not name.lower().endswith("_proxy")},
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_ENTITY": ENTITY,
            "WANDB_MODE": "online",
            "WANDB_DIR": str(folder),
            **{f"WANDB_{kind}_DIR": str(folder / f"wandb_{kind.lower()}") for kind in kinds},
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true",
            "NETRC": str(folder / "netrc"),
            "HTTP_PROXY": self.url,
            "HTTPS_PROXY": self.url,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @property
    def escaped(self) -> list[str]:
        """Requests that were meant for another host."""
        return [request for request in self.requests if not request.split(" ")[1].startswith("/")]

    def named(self, name: str) -> list[dict[str, Any]]:
        """The variables of each request of that GraphQL operation."""
        return [operation["variables"] for operation in self.operations if operation["name"] == name]

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows that a run (``run.id``) logged."""
        return [json.loads(line) for line in self.runs[run].lines.get("wandb-history.jsonl", [])]

    def summary(self, run: str) -> dict[str, Any]:
        """The last summary that a run sent."""
        lines = self.runs[run].lines.get("wandb-summary.json", [])
        return json.loads(lines[-1]) if lines else {}

    def config(self, run: str) -> dict[str, Any]:
        """The config that a run sent last. "_wandb" is W&B's own entry: metrics under "m", charts under "visualize"."""
        return {key: entry["value"] for key, entry in json.loads(self.runs[run].fields["config"]).items()}

    def table(self, run: str, key: str) -> dict[str, Any]:
        """The table that a run logged last under ``key``: ``{"columns": ..., "data": ...}``."""
        last = [row[key] for row in self.history(run) if key in row][-1]
        return json.loads(self.runs[run].files[last["path"]])

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """What a run sends while it runs: lines of its files."""
        with self._lock:
            for name, chunk in (body.get("files") or {}).items():
                self.runs[run].lines.setdefault(name, [])[chunk["offset"] :] = chunk["content"]
            self.runs[run].finished |= bool(body.get("complete"))

    def upload(self, path: str, content: bytes) -> None:
        """A file of a run or an artifact, or an artifact's manifest."""
        with self._lock:
            self._uploads[path] = content
            _, _, kind, owner, name = urllib.parse.unquote(path).split("/", 4)
            if kind == "run":
                self.runs[owner].files[name] = content
            elif kind == "artifact":
                self.artifacts[int(owner)].contents[name] = content
            else:
                self.artifacts[int(owner)].manifest = json.loads(content)

    def download(self, path: str) -> bytes | None:
        """What was uploaded there."""
        return self._uploads.get(path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent when a process ends and leaves its connections open."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    stub: WandbStub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            self._reply(200, self.stub.answer(json.loads(body)))
        elif self.path.endswith("/file_stream"):
            self.stub.stream(self.path.split("/")[-2], json.loads(body))
            self._reply(200, {})
        else:
            self._refuse()

    def do_PUT(self) -> None:
        body = self._body()
        if self.path.startswith("/upload/"):
            self.stub.upload(self.path, body)
            self._reply(200, {})
        else:
            self._refuse()

    def do_GET(self) -> None:
        self._body()
        content = self.stub.download(self.path)
        if content is None:
            self._refuse()
        else:
            self._reply(200, content)

    def do_CONNECT(self) -> None:
        self._body()
        self._refuse()

    def _body(self) -> bytes:
        self.stub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _refuse(self) -> None:
        self.stub.unknown.append(f"{self.command} {self.path}")
        self._reply(404, {"error": "The stub does not serve this."})

    def _reply(self, status: int, answer: dict[str, Any] | bytes) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Silent: what came is in ``requests``."""
