"""A model hub on this machine: the part of the API that pushing and pulling a model needs, over HTTP.

Repositories, commits with all their files, large files (LFS) in steps of their own, tokens, visibility, and refusals on
demand: `hub.refuse("POST", "/commit/", 429, times=1, headers={"Retry-After": "0"})`.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "a" * 30


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def files(self, revision):
        """(commit, files) of a branch or commit; None if there is none."""
        if revision in ("main", None):
            return self.commits[-1] if self.commits else ("0" * 40, {})
        return next((each for each in self.commits if each[0] == revision), None)


class Hub:
    def __init__(self):
        self.repositories, self.blobs, self.requests, self.refusals = {}, {}, [], []

    def refuse(self, method, part, status, times=1, headers=None):
        self.refusals.append([method, part, status, times, headers or {}])

    def refusal(self, method, path):
        for each in self.refusals:
            if each[0] == method and each[1] in path and each[3] > 0:
                each[3] -= 1
                return each[2], each[4]
        return None

    def commit(self, name, changed):
        """Adds a commit in which these files changed, and returns its identifier."""
        repository = self.repositories[name]
        files = {**repository.files("main")[1], **changed}
        digest = hashlib.sha1(repr((len(repository.commits), sorted(files))).encode()).hexdigest()
        repository.commits.append((digest, files))
        return digest


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _handle(self, method):
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((method, self.path))
        if refused := self.hub.refusal(method, path):
            return self._json({"error": "refused"}, refused[0], refused[1])
        for wanted, pattern, act in ROUTES:
            if wanted == method and (found := re.fullmatch(pattern, path)):
                return act(self, *(unquote(each) for each in found.groups()), body=body, query=query)
        return self._json({"error": f"no such route: {method} {path}"}, 404)

    do_GET = lambda self: self._handle("GET")  # noqa: E731
    do_HEAD = lambda self: self._handle("HEAD")  # noqa: E731
    do_POST = lambda self: self._handle("POST")  # noqa: E731
    do_PUT = lambda self: self._handle("PUT")  # noqa: E731

    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, name):
        """The repository if it may be seen; else the hub's answer is sent: as of one that does not exist."""
        repository = self.hub.repositories.get(name)
        if repository is not None and (self._known() or not repository.private):
            return repository
        status = 404 if self._known() else 401
        self._json({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
        return None

    def create(self, body, query):
        if not self._known():
            return self._json({"error": "Unauthorized"}, 401)
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name.startswith("others/"):
            return self._json({"error": "Forbidden"}, 403)
        if name in self.hub.repositories:
            return self._json({"error": "exists"}, 409)
        self.hub.repositories[name] = Repository(bool(asked.get("private") or asked.get("visibility") == "private"))
        return self._json({"url": f"{self._address()}/{name}", "name": name, "id": name})

    def info(self, name, revision=None, body=b"", query=None):
        repository = self._repository(name)
        if repository is None:
            return None
        if (found := repository.files(revision)) is None:
            return self._json({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        siblings = [{"rfilename": each, "size": len(content)} for each, content in files.items()]
        about = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        return self._json({**about, "tags": [], "downloads": 0, "likes": 0})

    def validate(self, body, query):
        return self._json({"errors": [], "warnings": []})

    def preupload(self, name, _, body, query):
        if self._repository(name) is None:
            return None
        files = [
            {"path": each["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".duckdb")) else "regular"}
            for each in json.loads(body)["files"]
        ]  # fmt: skip
        return self._json({"files": files})

    def batch(self, name, body, query):
        objects = [
            {"oid": each["oid"], "size": each["size"], "authenticated": True,
             "actions": {"upload": {"href": f"{self._address()}/blobs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]  # fmt: skip
        return self._json({"transfer": "basic", "objects": objects})

    def blob(self, digest, body, query):
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.blobs[digest] = body
        return self._send(b"")

    def commit(self, name, _, body, query):
        if self._repository(name) is None:
            return None
        changed = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changed[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.commit(name, changed)
        return self._json(
            {"commitUrl": f"{self._address()}/{name}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def resolve(self, name, revision, path, body, query):
        repository = self._repository(name)
        if repository is None:
            return None
        commit, files = repository.files(revision)
        if path not in files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        about = {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', "X-Repo-Commit": commit}
        return self._send(files[path], 200, about)

    def _address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *_):
        pass


_REPOSITORY = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{_REPOSITORY}", Handler.info),
    ("GET", f"/api/models/{_REPOSITORY}/revision/(.+)", Handler.info),
    ("POST", f"/api/models/{_REPOSITORY}/preupload/(.+)", Handler.preupload),
    ("POST", f"/{_REPOSITORY}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/blobs/(\w+)", Handler.blob),
    ("POST", f"/api/models/{_REPOSITORY}/commit/(.+)", Handler.commit),
    ("GET", f"/{_REPOSITORY}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("HEAD", f"/{_REPOSITORY}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextlib.contextmanager
def serve_hub():
    """(hub, its address)"""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handles", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
