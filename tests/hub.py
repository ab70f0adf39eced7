"""A small stand-in for the Hub: it takes the requests of huggingface_hub for one user and keeps what is pushed."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """A server on this machine, in place of the Hub for processes that have its address as `HF_ENDPOINT`."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, list[str]]] = []
        hub = self

        class Handler(_Handler):
            server_of = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What a process needs to use this server."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        hub, body = self.server_of, self.body()
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"tester/{request['name']}"
            hub.files.setdefault(name, {})
            self.reply({"url": f"{hub.url}/{name}", "name": name})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/.+", self.path):
            files = json.loads(body)["files"]
            large = (".safetensors", ".pt", ".pth", ".bin", ".png")
            modes = ["lfs" if file["path"].endswith(large) else "regular" for file in files]
            answers = zip(files, modes, strict=True)
            self.reply({"files": [{"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in answers]})
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", self.path):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}} for item in objects]
            answers = zip(objects, actions, strict=True)
            self.reply({"transfer": "basic", "objects": [{**item, "actions": action} for item, action in answers]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/.+", self.path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply({})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        hub, changed = self.server_of, []
        summary = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                hub.files[name][value["path"]] = base64.b64decode(value["content"])
                changed.append(value["path"])
            elif line["key"] == "lfsFile":
                hub.files[name][value["path"]] = hub.objects[value["oid"]]
                changed.append(value["path"])
        hub.commits.append((summary, changed))
        commit = f"{len(hub.commits):040x}"
        self.reply({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def do_PUT(self) -> None:
        self.server_of.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply({}, headers={"ETag": '"x"'})

    def do_GET(self) -> None:
        hub = self.server_of
        if self.path == "/api/whoami-v2":
            self.reply({"name": "tester", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        elif found := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", self.path):
            content = hub.files.get(found[1], {}).get(found[2])
            headers = {"ETag": '"x"', "X-Repo-Commit": f"{len(hub.commits):040x}"}
            self.reply(content or b"", 200 if content is not None else 404, headers)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?(\?.*)?", self.path):
            files = [{"rfilename": path} for path in hub.files.get(found[1], {})]
            self.reply({"id": found[1], "sha": f"{len(hub.commits):040x}", "siblings": files, "private": False})
        else:
            self.reply([])

    def do_HEAD(self) -> None:
        self.do_GET()
