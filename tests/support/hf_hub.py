"""A Hugging Face hub on loopback, which the real clients use through HF_ENDPOINT.

It speaks what huggingface_hub and datasets ask of the hub, without xet: repositories with commits
and branches, listings, downloads with ETags and ranges (large files by a redirect to another
origin, as the hub's CDN), accounts, gated and private repositories, and commits with LFS uploads.

    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("google/gemma-scope-2b-pt-res", files={"a/params.npz": data})
        subprocess.run([...], env={**os.environ, **hub.environ(tmp_path / "home")})
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.support.hf_hub_pages import (
    LFS_BYTES,
    LFS_SUFFIXES,
    Blob,
    Fault,
    Pages,
    Repo,
    Request,
    User,
)

Files = Mapping[str, bytes] | Path


class HubServer:
    """See the module. `users` by token; `requests` is all that was asked, in order."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users = {"hf_alice": User("alice", ("alice", "org"))}
        self.requests: list[Request] = []
        self.sent: list[str] = []
        self.status_of_all = 200
        """Anything else is answered to everything: the hub is down."""
        self.before_commit: Callable[[], object] = lambda: None
        self.faults: dict[str, Fault] = {}
        self.lock = threading.Lock()
        handler = type("Handler", (Pages,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"  # another origin: clients send it no token
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=[0.02], daemon=True).start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environ(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a client of this hub whose home, caches and data are under `home`."""
        return {
            "HOME": str(home),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf"),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "NEUROSCOPE_DATA": str(home / "data"),
        }

    def add_user(self, name: str) -> str:
        """Somebody who may write to nothing but their own repositories. Returns their token."""
        self.users[f"hf_{name}"] = User(name, (name,))
        return f"hf_{name}"

    def add_repo(
        self,
        name: str,
        files: Files = {},  # noqa: B006  (never changed)
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
        revision_branches: Mapping[str, Files] | None = None,
    ) -> str:
        """A repository with one commit on main, and one on each branch. Returns main's commit."""
        self.repos[repo_type, name] = Repo(name, repo_type, private, gated)
        commit = self.commit(name, files, repo_type=repo_type)
        for branch, content in (revision_branches or {}).items():
            self.commit(name, content, repo_type=repo_type, branch=branch)
        return commit

    def commit(
        self, name: str, files: Files, *, repo_type: str = "model", branch: str = "main"
    ) -> str:
        """Add files, or put them in place of others, in a new commit, which is returned."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        return self.set_files(
            self.repos[repo_type, name], branch, {k: self.store(k, v) for k, v in files.items()}
        )

    def set_files(self, repo: Repo, branch: str, changes: Mapping[str, Blob | None]) -> str:
        before = repo.commits.get(repo.refs.get(branch, ""), {})
        after = {path: blob for path, blob in (before | dict(changes)).items() if blob}
        text = repr((repo.name, branch, len(repo.commits), sorted(after.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[commit] = after
        repo.refs[branch] = commit
        return commit

    def store(self, path: str, data: bytes) -> Blob:
        lfs = path.endswith(LFS_SUFFIXES) or len(data) > LFS_BYTES
        git_oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = Blob(hashlib.sha256(data).hexdigest(), git_oid, len(data), lfs)
        (self.root / blob.sha256).write_bytes(data)
        return blob

    def read(self, name: str, path: str, *, repo_type: str = "model") -> bytes:
        """A file as it stands on main."""
        _, files = self.repos[repo_type, name].files("main")
        return (self.root / files[path].sha256).read_bytes()

    def breaks(self, data: bytes, after: int, *, holds: bool = False) -> threading.Event:
        """Let the next download of `data` end, or stand still, after some bytes: then set."""
        fault = Fault(after, holds)
        self.faults[hashlib.sha256(data).hexdigest()] = fault
        return fault.reached

    def downloads(self) -> list[str]:
        """Paths of the files whose content was sent, in order."""
        names = {}
        for repo in self.repos.values():
            for files in repo.commits.values():
                names |= {blob.sha256: path for path, blob in files.items()}
        return [names[sha256] for sha256 in self.sent]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that the client in this process uses: it read its variables when it was imported."""
    with HubServer(tmp_path / "hub") as server:
        home = tmp_path / "home"
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setenv("NEUROSCOPE_DATA", str(home / "data"))
        huggingface_hub.close_session()
        yield server
