"""A stand-in for the model hub that takes a commit over HTTP, and keeps what it got."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_a_test"


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of this machine, in a thread.

    Attributes:
        repositories: name -> whether it is private; files: path in the repository -> bytes.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, lines: list[dict]) -> dict:
        if path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            self.repositories[name] = lines[0].get("visibility") == "private"
            return {"url": f"{self.address}/{name}", "id": name}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in lines[0]["files"]]
            return {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        if path.endswith("/commit/main"):
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            return {"commitUrl": f"{self.address}/{min(self.repositories)}/commit/1", "commitOid": "1" * 40}
        return {"errors": [], "warnings": []}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        status, document = 401, {"error": "Invalid username or password."}
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            status, document = (
                200,
                self.server.answer(self.path.partition("?")[0], list(map(json.loads, lines))),
            )
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass
