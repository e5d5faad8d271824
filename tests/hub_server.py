"""A stand-in for the Hub on this machine: the part of its HTTP interface that huggingface_hub and diffusers use.

Repositories of models live in memory, with one branch. Large files take the way of git LFS, as they do on the Hub for
clients without Xet. Writing needs the token.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

USER = "friend"
TOKEN = "hf_stand_in"


class Hub:
    """The repositories, id -> path -> content. `client_environment` sends a process here instead of to the real Hub."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.repositories = {}
        self.private = set()
        self.uploads = {}

    def client_environment(self, home):
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def commit_hash(self, repo_id):
        files = self.repositories[repo_id]
        return hashlib.sha1(repr(sorted((path, etag(data)) for path, data in files.items())).encode()).hexdigest()

    def create(self, repo):
        repo_id = f"{repo['organization'] or USER}/{repo['name']}"
        status = 409 if repo_id in self.repositories else 200
        self.repositories.setdefault(repo_id, {})
        if repo.get("visibility") == "private" or repo.get("private"):
            self.private.add(repo_id)
        return status, {"url": f"{self.endpoint}/{repo_id}"}

    def commit(self, repo_id, lines):
        files = self.repositories[repo_id]
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.commit_hash(repo_id)
        return 200, {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit}", "commitOid": commit}


def is_large(path):
    return path.endswith((".safetensors", ".png"))


def etag(data):
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path_asked_for()
        if path.startswith("/api/models/"):
            self.get_api(*split_api(path))
        elif "/resolve/" in path:
            repo_id, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            self.get_file(repo_id, revision, file)
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self):
        path, body = self.path_asked_for(), self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            # The Hub knows its licences. Clients ask this with and without their token.
            unknown = re.search("^license: (?!mit$|apache-2.0$)", json.loads(body)["content"], re.MULTILINE)
            errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}] if unknown else []
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            self.answer(*self.server.hub.create(json.loads(body)))
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.upload_action(item) for item in json.loads(body)["objects"]]
            self.answer(200, {"transfer": "basic", "objects": objects})
        else:
            repo_id, action, _ = split_api(path)
            if repo_id not in self.server.hub.repositories:
                self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            elif action == "preupload":
                files = [
                    {"path": p, "uploadMode": "lfs" if is_large(p) else "regular", "shouldIgnore": False}
                    for p in (item["path"] for item in json.loads(body)["files"])
                ]
                self.answer(200, {"files": files})
            elif action == "commit":
                self.answer(*self.server.hub.commit(repo_id, body))

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path_asked_for().rpartition("/")[2]
        if etag(data) == oid:
            self.server.hub.uploads[oid] = data
        self.answer(200 if etag(data) == oid else 400)

    def upload_action(self, item):
        return item | {"actions": {"upload": {"href": f"{self.server.hub.endpoint}/lfs/{item['oid']}"}}}

    def get_api(self, repo_id, action, revision):
        files = self.files_of(repo_id, revision)
        if files is None:
            return
        commit = self.server.hub.commit_hash(repo_id)
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            private = repo_id in self.server.hub.private
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "private": private}
            self.answer(200, info | {"tags": [], "downloads": 0, "likes": 0})
        elif action == "tree":
            self.answer(200, [tree_entry(path, data) for path, data in files.items()])
        else:
            self.answer(404)

    def get_file(self, repo_id, revision, path):
        files = self.files_of(repo_id, revision)
        if files is None:
            return
        headers = {"X-Repo-Commit": self.server.hub.commit_hash(repo_id)}
        if path not in files:
            self.answer(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, files[path], headers | {"ETag": f'"{etag(files[path])}"'})

    def files_of(self, repo_id, revision):
        """The files of a repository; answers as the Hub does, and returns `None`, where there is no such thing."""
        hub = self.server.hub
        if repo_id not in hub.repositories:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", hub.commit_hash(repo_id)):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return hub.repositories[repo_id]

    def path_asked_for(self):
        return unquote(urlsplit(self.path).path)

    def answer(self, status, content=b"", headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def split_api(path):
    """`/api/models/USER/NAME/ACTION/REVISION` -> id, action, revision; the last two may be missing."""
    user, name, action, revision, *_ = [*path.removeprefix("/api/models/").split("/"), "", ""]
    return f"{user}/{name}", action, revision


def tree_entry(path, data):
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return entry | ({"lfs": {"oid": etag(data), "size": len(data), "pointerSize": 130}} if is_large(path) else {})


@contextmanager
def serve_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
