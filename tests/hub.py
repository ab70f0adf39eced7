"""A small stand-in for the Hub: it takes the requests of huggingface_hub for one user and keeps what is pushed.

It answers as the Hub does where that matters: a commit changes all its files at once, large files are uploaded before
it, once for each content, revisions are branches, tags or commits, and writing needs the user's token.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import transformers.utils.hub

TOKEN = "hf_test"
LARGE = (".safetensors", ".pt", ".pth", ".bin", ".png")
NOT_FOUND = {"repository": "RepoNotFound", "revision": "RevisionNotFound", "file": "EntryNotFound"}


class File(NamedTuple):
    """A file of a commit."""

    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """What tells a file's content: a SHA-256 for large ones, else that of git."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """Its line in a listing."""
        size = len(self.content)
        large = {"lfs": {"oid": self.oid, "size": size, "pointerSize": 134}} if self.is_large else {}
        return {"type": "file", "path": path, "size": size, "oid": self.oid, **large}


class Repository:
    """Commits, and the branches and tags that name some of them."""

    def __init__(self, is_private: bool) -> None:
        self.is_private = is_private
        self.commits: dict[str, dict[str, File]] = {}
        self.names: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, File]) -> str:
        """Let a branch have these files from now on."""
        content = repr([(path, file.oid) for path, file in sorted(files.items())])
        oid = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[oid] = files
        self.names[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag, or a commit's own name."""
        oid = self.names.get(revision, revision)
        return oid if oid in self.commits else None


class RefusalError(Exception):
    """A request that is not answered with what it asks for."""

    def __init__(self, status: int, error: str, code: str | None = None) -> None:
        super().__init__(error)
        self.status, self.code = status, code


class HubServer:
    """A server on this machine, in place of the Hub for processes that have its address as `HF_ENDPOINT`.

    `fault` is asked before a request is answered: it may return the status of an error to answer with.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.commits: list[tuple[str, list[str]]] = []
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_of = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def files(self) -> dict[str, dict[str, bytes]]:
        """The contents of the main branches, by repository and path."""
        return {name: self.files_of(name, "main") for name in self.repositories}

    def files_of(self, name: str, revision: str) -> dict[str, bytes]:
        """The contents of a repository's files at a revision."""
        repository = self.repositories[name]
        return {path: file.content for path, file in repository.commits[repository.find(revision) or ""].items()}

    def uploads(self) -> list[str]:
        """The SHA-256 of the large files that were sent, in the order of the requests."""
        return [path.rsplit("/", 1)[1] for method, path in self.requests if method == "PUT"]

    def environment(self) -> dict[str, str]:
        """What a process needs to use this server."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    @contextmanager
    def in_this_process(self) -> Iterator[None]:
        """Let the libraries of this process use the server: they read the Hub's address when they were imported."""
        with pytest.MonkeyPatch.context() as patch:
            constants = huggingface_hub.constants
            patch.setattr(constants, "ENDPOINT", self.url)
            template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)  # that of functions such as create_repo
            patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # the one that it keeps
            patch.setenv("HF_TOKEN", TOKEN)
            yield

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def handle_method(self) -> None:
        hub, path = self.server_of, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if status := hub.fault(self.command, path):
                raise RefusalError(status, "Something went wrong.")
            self.answer(path, body)
        except RefusalError as failure:
            headers = {"X-Error-Code": failure.code} if failure.code else {}
            self.reply({"error": str(failure)}, failure.status, headers | {"X-Error-Message": str(failure)})

    do_GET = do_HEAD = do_POST = do_PUT = handle_method  # noqa: N815

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self, path: str, body: bytes) -> None:
        hub = self.server_of
        if path.startswith("/lfs/"):  # the address is the permission
            self.upload(path.rsplit("/", 1)[1], body)
        elif path == "/api/whoami-v2":
            self.check_token()
            self.reply({"name": "tester", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply({})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.check_token()
            self.say_what_to_upload(json.loads(body)["objects"])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.+))?)?", path):
            name, action, rest = found.groups()
            if self.command == "POST" and action != "paths-info":
                self.check_token()
            self.answer_about(name, self.repository(name), action, rest or "main", body)
        else:
            raise RefusalError(404, f"{hub.url} has no {path}")

    def check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "Invalid username or password.")

    def repository(self, name: str) -> Repository:
        repository = self.server_of.repositories.get(name)
        if repository is None or (repository.is_private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise RefusalError(401, "Repository not found", NOT_FOUND["repository"])
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", NOT_FOUND["revision"])
        return commit

    def answer_about(self, name: str, repository: Repository, action: str | None, rest: str, body: bytes) -> None:
        request = json.loads(body) if body and action != "commit" else {}
        if action in (None, "revision"):
            commit = self.commit_of(repository, rest)
            files = [{"rfilename": path} for path in repository.commits[commit]]
            self.reply({"id": name, "sha": commit, "siblings": files, "private": repository.is_private, "tags": []})
        elif action == "tree":
            self.list_tree(repository, *rest.partition("/")[::2])
        elif action == "paths-info":
            files = repository.commits[self.commit_of(repository, rest)]
            self.reply([files[path].entry(path) for path in request["paths"] if path in files])
        elif action == "preupload":
            files = repository.commits[self.commit_of(repository, rest)]
            self.reply({"files": [self.upload_mode(files, file["path"]) for file in request["files"]]})
        elif action == "branch":
            if rest in repository.names:
                raise RefusalError(409, f"Reference already exists: {rest}")
            repository.names[rest] = self.commit_of(repository, request.get("startingPoint", "main"))
            self.reply({})
        elif action == "tag":
            repository.names[request["tag"]] = self.commit_of(repository, rest)
            self.reply({})
        elif action == "commit":
            self.commit(name, repository, rest, [json.loads(line) for line in body.splitlines()])
        else:
            raise RefusalError(404, f"nothing known of {action}")

    def create(self, request: dict[str, Any]) -> None:
        self.check_token()
        hub, owner = self.server_of, request.get("organization") or "tester"
        if owner != "tester":
            raise RefusalError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{request['name']}"
        answer = {"url": f"{hub.url}/{name}", "name": name}
        if name in hub.repositories:
            self.reply(answer | {"error": "You already created this model repo"}, 409)
            return
        hub.repositories[name] = Repository(request.get("private") or request.get("visibility") == "private")
        self.reply(answer)

    def list_tree(self, repository: Repository, revision: str, folder: str) -> None:
        files = repository.commits[self.commit_of(repository, revision)]
        inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
        if folder and not inside:
            raise RefusalError(404, f"{folder} does not exist", NOT_FOUND["file"])
        self.reply([files[path].entry(path) for path in inside])

    def upload_mode(self, files: dict[str, File], path: str) -> dict[str, Any]:
        known = {"oid": files[path].oid} if path in files else {}
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
            "shouldIgnore": False,
        } | known

    def say_what_to_upload(self, objects: list[dict[str, Any]]) -> None:
        hub = self.server_of
        missing = {item["oid"]: {"actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in objects}
        answers = [item | ({} if item["oid"] in hub.objects else missing[item["oid"]]) for item in objects]
        self.reply({"transfer": "basic", "objects": answers})

    def upload(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, "The content is not what was announced.")
        self.server_of.objects[oid] = content
        self.reply({}, headers={"ETag": f'"{oid}"'})

    def commit(self, name: str, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        hub, summary, changed = self.server_of, "", []
        with hub.lock:
            files = dict(repository.commits[self.commit_of(repository, branch)])
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    summary = value["summary"]
                    continue
                path = value["path"]
                changed.append(path)
                if line["key"] == "file":
                    files[path] = File(base64.b64decode(value["content"]), is_large=False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in hub.objects:
                        raise RefusalError(400, f"LFS pointer of {path} points to a file that does not exist")
                    files[path] = File(hub.objects[value["oid"]], is_large=True)
                elif line["key"] == "deletedFile":
                    del files[path]
            commit = repository.commit(branch, files)
            hub.commits.append((summary, changed))
        self.reply({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def send_file(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        commit = self.commit_of(repository, revision)
        file = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if file is None:
            headers |= {"X-Error-Code": NOT_FOUND["file"], "X-Error-Message": "Entry not found"}
            self.reply(b"", 404, headers)
            return
        headers["ETag"] = f'"{file.oid}"'
        if file.is_large:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self.reply(file.content, headers=headers)
