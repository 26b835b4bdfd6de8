"""The pages of `hf_hub`: one handler for each thing that the clients ask."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from tests.support.hf_hub import HubServer

LFS_SUFFIXES = (".safetensors", ".parquet", ".npz", ".bin")  # as the hub's .gitattributes
LFS_BYTES = 10 << 20
LICENSES = ["mit", "apache-2.0", "cc-by-4.0", "other"]  # some of the hub's
CHUNK = 1 << 16


class Refusal(Exception):
    """An error of the hub: status, X-Error-Code (or ""), X-Error-Message."""

    def __init__(self, status: int, code: str, message: str, commit: str = "", **more: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **more}
        self.headers = {"X-Error-Message": message}
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Repo-Commit": commit} if commit else {}


class User(NamedTuple):
    name: str
    namespaces: tuple[str, ...]  # where it may write


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    token: str | None


class Blob(NamedTuple):
    sha256: str
    git_oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    name: str
    type: str
    private: bool = False
    gated: bool = False
    accepted: set[str] = field(default_factory=set)  # names of users
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def files(self, revision: str) -> tuple[str, dict[str, Blob]]:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, self.commits[commit]


@dataclass
class Fault:
    """What goes wrong with the body of a file: the connection ends, or stands still."""

    after: int  # bytes
    holds: bool
    reached: threading.Event = field(default_factory=threading.Event)


_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LFS_BATCH = re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class Pages(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        self.token = token if scheme == "Bearer" and token else None
        request = Request(self.command, url.path, self.headers.get("Range"), self.token)
        with self.hub.lock:
            self.hub.requests.append(request)
        try:
            self.route(url.path, parse_qs(url.query), body)
        except Refusal as refusal:
            self.send(refusal.status, refusal.body, refusal.headers)

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if self.hub.status_of_all != 200:
            raise Refusal(self.hub.status_of_all, "", "the hub is down")
        if self.token is not None and self.token not in self.hub.users:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if path.startswith("/cdn/"):
            return self.send_file(path.removeprefix("/cdn/"), {})
        if path.startswith("/lfs/"):
            return self.take_upload(path.removeprefix("/lfs/"), body)
        if path == "/api/whoami-v2":
            user = self.user()
            return self.send(200, {"type": "user", "name": user.name, "orgs": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate_yaml(json.loads(body)["content"])
        if match := _LFS_BATCH.fullmatch(path):
            repo = self.repo("dataset" if match[1] else "model", match[2], writes=True)
            return self.batch(repo, json.loads(body))
        if match := _RESOLVE.fullmatch(path):
            repo = self.repo("dataset" if match[1] else "model", match[2], content=True)
            return self.resolve(repo, unquote(match[3]), unquote(match[4]))
        if match := _API.fullmatch(path):
            action, revision = match[3] or "revision", unquote(match[4] or "main")
            writes = action in ("preupload", "commit")
            repo = self.repo(match[1], match[2], writes=writes)
            if action == "revision":
                return self.info(repo, revision)
            if action == "tree":
                return self.tree(repo, revision, unquote(match[5] or ""), "recursive" in query)
            if action == "paths-info":
                return self.paths_info(repo, revision, body)
            if action == "refs":
                branches = [{"name": n, "ref": n, "targetCommit": c} for n, c in repo.refs.items()]
                return self.send(200, {"branches": branches, "converts": [], "tags": []})
            if action == "preupload":
                return self.preupload(repo, revision, json.loads(body))
            if action == "commit":
                return self.commit(repo, revision, body)
        raise Refusal(404, "", f"no such page: {path}")

    # Who may do what.

    def user(self) -> User:
        if self.token is None:
            raise Refusal(401, "", "Invalid username or password.")
        return self.hub.users[self.token]

    def repo(
        self, repo_type: str, name: str, *, writes: bool = False, content: bool = False
    ) -> Repo:
        repo = self.hub.repos.get((repo_type, name))
        user = self.hub.users[self.token] if self.token else None
        owns = user is not None and name.split("/")[0] in user.namespaces
        if repo is None or (repo.private and not owns):
            if user is None:  # the hub does not say which repositories exist
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if writes and not owns:
            self.user()
            raise Refusal(403, "", f"You don't have the rights to write to {name}")
        accepted = owns or (user is not None and user.name in repo.accepted)
        if content and repo.gated and not accepted:
            status = 401 if user is None else 403
            raise Refusal(status, "GatedRepo", f"Access to {repo_type} {name} is restricted.")
        return repo

    # Reading.

    def info(self, repo: Repo, revision: str) -> None:
        commit, files = repo.files(revision)
        siblings = [
            {"rfilename": path, "size": blob.size, "blobId": blob.git_oid}
            for path, blob in files.items()
        ]
        self.send(
            200,
            {
                "_id": "0",
                "id": repo.name,
                "author": repo.name.split("/")[0],
                "sha": commit,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": siblings,
            },
        )

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> None:
        commit, files = repo.files(revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist", commit)
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                above = prefix + "/".join(parts[:depth])
                entries[above] = _entry(above, None)
            if recursive or len(parts) == 1:
                entries[path] = _entry(path, blob)
        self.send(200, [entries[path] for path in sorted(entries)])

    def paths_info(self, repo: Repo, revision: str, body: bytes) -> None:
        _, files = repo.files(revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode())["paths"]
        entries = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                entries.append(_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append(_entry(path, None))
        self.send(200, entries)

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit, files = repo.files(revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found", commit)
        blob = files[path]
        headers = {"X-Repo-Commit": commit}
        if blob.lfs:
            headers |= {
                "X-Linked-Size": str(blob.size),
                "X-Linked-ETag": f'"{blob.etag}"',
                "Location": f"{self.hub.cdn}/cdn/{blob.sha256}",
            }
            self.send(302, {}, headers)
        else:
            self.send_file(blob.sha256, headers | {"ETag": f'"{blob.etag}"'})

    def send_file(self, sha256: str, headers: dict[str, str]) -> None:
        path = self.hub.root / sha256
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        end = min(int(span[2]) + 1 if span and span[2] else size, size)
        if span and start >= size:
            raise Refusal(416, "", "Range not satisfiable")
        self.send_response(206 if span else 200)
        headers = headers | {"Accept-Ranges": "bytes", "Content-Length": str(end - start)}
        if span:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.sent.append(sha256)
        fault = self.hub.faults.pop(sha256, None)
        stop = min(end, start + fault.after) if fault else end
        with contextlib.suppress(ConnectionError), path.open("rb") as file:
            file.seek(start)
            while (left := stop - file.tell()) > 0:
                self.wfile.write(file.read(min(CHUNK, left)))
            if fault:
                fault.reached.set()
            if fault and fault.holds:
                self.rfile.read(1)  # until the client is gone
        self.close_connection = fault is not None

    # Writing.

    def create(self, asked: dict[str, Any]) -> None:
        user = self.user()
        namespace = asked.get("organization") or user.name
        name, kind = f"{namespace}/{asked['name']}", asked.get("type") or "model"
        if namespace not in user.namespaces:
            raise Refusal(
                403, "", f"You don't have the rights to create a {kind} under {namespace}"
            )
        url = f"{self.hub.url}/{kind}s/{name}"
        if (kind, name) in self.hub.repos:
            raise Refusal(409, "", f"You already created this {kind} repo", url=url)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        attributes = "".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES).encode()
        files = {".gitattributes": attributes}
        self.hub.add_repo(name, files, repo_type=kind, private=private)
        self.send(200, {"url": url, "name": name, "id": "0"})

    def validate_yaml(self, content: str) -> None:
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            card = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self.send(400, {"errors": [{"message": str(error)}], "warnings": []})
        if isinstance(card, dict) and card.get("license", "mit") not in LICENSES:
            errors = [{"message": f'"license" must be one of {LICENSES}'}]
            return self.send(400, {"errors": errors, "warnings": []})
        warnings = [] if isinstance(card, dict) else [{"message": "empty or missing yaml metadata"}]
        return self.send(200, {"errors": [], "warnings": warnings})

    def preupload(self, repo: Repo, revision: str, asked: dict[str, Any]) -> None:
        _, files = repo.files(revision)
        modes = []
        for file in asked["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            there = files.get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular"}
            modes.append(entry | {"shouldIgnore": False, "oid": there.etag if there else None})
        self.send(200, {"files": modes})

    def batch(self, repo: Repo, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
            needed = not (self.hub.root / item["oid"]).exists()
            objects.append(item | ({"actions": {"upload": upload}} if needed else {}))
        self.send(200, {"transfer": "basic", "objects": objects})

    def take_upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "the content is not what its hash says")
        (self.hub.root / oid).write_bytes(body)
        self.send(200, {})

    def commit(self, repo: Repo, revision: str, body: bytes) -> None:
        self.hub.before_commit()
        head, _ = repo.files(revision)
        changes: dict[str, Blob | None] = {}
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit") not in (None, head):
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                data = base64.b64decode(value["content"])
                changes[value["path"]] = self.hub.store(value["path"], data)._replace(lfs=False)
            elif key == "lfsFile":
                data = (self.hub.root / value["oid"]).read_bytes()
                changes[value["path"]] = self.hub.store(value["path"], data)._replace(lfs=True)
            elif key == "deletedFile":
                changes[value["path"]] = None
        commit = self.hub.set_files(repo, revision, changes)
        url = f"{self.hub.url}/{repo.type}s/{repo.name}/commit/{commit}"
        self.send(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def send(self, status: int, content: object, headers: Mapping[str, str] = {}) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, blob: Blob | None) -> dict[str, Any]:
    """A file or folder as listings show it."""
    commit = {"id": "0" * 40, "title": "commit", "date": "2026-01-01T00:00:00.000Z"}
    if blob is None:
        oid = hashlib.sha1(path.encode()).hexdigest()
        return {
            "type": "directory",
            "oid": oid,
            "size": 0,
            "path": path,
            "lastCommit": commit,
        }
    entry = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry | {"lastCommit": commit}
