"""A stand-in for the Hugging Face Hub on 127.0.0.1: the endpoints that huggingface_hub and datasets call.

    with serve() as hub, connected(hub, cache):
        hub.add("owner/name", folder)      # a model; datasets have kind="datasets"
        …
    hub.requests                           # "GET /owner/name/resolve/…", with the requested ranges

Repositories are kept in memory, with one commit per change and one branch. A repository may be private, gated (403) or
interrupted: connections close in the middle of a file.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".gguf", ".parquet", ".gz")  # stored as LFS files


@dataclass
class Repository:
    """One repository: its files, and who may read it."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: list[str] = field(default_factory=lambda: ["0" * 40])

    def commit(self, revision: str | None = None) -> str:
        """The commit of a revision; the last one of the branch."""
        return revision if revision in self.commits else self.commits[-1]


@dataclass
class Hub:
    """The state of the server. `cut` closes connections after these numbers of bytes of a large file."""

    address: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    writable: bool = True

    def add(self, name: str, source: Path | dict[str, bytes], *, kind: str = "models", **options: Any) -> Repository:
        files = source if isinstance(source, dict) else {
            file.relative_to(source).as_posix(): file.read_bytes() for file in source.rglob("*") if file.is_file()
        }  # fmt: skip
        repository = Repository(dict(files), **options)
        self.repositories[kind, name] = repository
        return repository

    def downloads(self, ending: str = "") -> list[str]:
        """The requests for contents of files whose names end like this."""
        return [line for line in self.requests if line.startswith("GET") and "/resolve/" in line and ending in line]


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        place = urlsplit(self.path)
        self.path_parts = [unquote(part) for part in place.path.strip("/").split("/")]
        self.query = parse_qs(place.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {unquote(place.path)}" + (f" {asked}" if asked else ""))
        match self.path_parts:
            case ["api", "whoami-v2"]:
                self._json({"name": "owner", "type": "user", "auth": {"accessToken": {"role": "write"}}})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create()
            case ["uploads", digest]:
                self.hub.uploads[digest] = self.body
                self._json({})
            case ["api", kind, owner, name, *rest] if kind in ("models", "datasets"):
                self._api(kind, f"{owner}/{name}", rest)
            case parts if "resolve" in parts:
                self._file(parts[: parts.index("resolve")], parts[parts.index("resolve") + 1])
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._lfs(f"{owner}/{name.removesuffix('.git')}")
            case _:
                self._json({"error": f"not served: {self.path}"}, 404)

    def _repository(self, kind: str, name: str, revision: str | None = None) -> Repository | None:
        """The repository, or None after an error was sent."""
        repository = self.hub.repositories.get((kind, name))
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not authorized):
            self._json({"error": "Repository not found"}, 404 if authorized else 401, code="RepoNotFound")
        elif revision is not None and revision not in ("main", *repository.commits):
            self._json({"error": f"Invalid rev id: {revision}"}, 404, code="RevisionNotFound")
        else:
            return repository
        return None

    def _api(self, kind: str, name: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else None
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": file, "size": len(data)} for file, data in repository.files.items()]
                self._json({"_id": "1", "id": name, "modelId": name, "sha": repository.commit(revision), "tags": [],
                            "private": repository.private, "gated": "manual" if repository.gated else False,
                            "siblings": siblings, "downloads": 0, "likes": 0})  # fmt: skip
            case ["tree", _, *inner]:
                self._json(self._tree(repository, "/".join(inner)))
            case ["paths-info", _]:
                body = parse_qs(self.body.decode()) if self.body[:1] != b"{" else json.loads(self.body)
                self._json([entry for path in body["paths"] for entry in self._entries(repository, path.strip("/"))])
            case ["preupload", _]:
                files = json.loads(self.body)["files"]
                self._json({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode": mode(file["path"])}
                                      for file in files]})  # fmt: skip
            case ["commit", _]:
                self._commit(repository, name)
            case _:
                self._json({"error": f"not served: {self.path}"}, 404, code="EntryNotFound")

    def _tree(self, repository: Repository, folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        inside = [name.removeprefix(prefix) for name in repository.files if name.startswith(prefix)]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            inside = [name.split("/")[0] for name in inside]
        return [entry for name in dict.fromkeys(inside) for entry in self._entries(repository, prefix + name)]

    def _entries(self, repository: Repository, path: str) -> list[dict[str, Any]]:
        """The file or folder at a path, as the Hub describes it."""
        if path in repository.files:
            data = repository.files[path]
            large = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if large_file(path) else {}
            return [{"type": "file", "path": path, "size": len(data), "oid": blob(data), **large}]
        inside = any(name.startswith(f"{path}/") for name in repository.files)
        return [{"type": "directory", "path": path, "oid": blob(path.encode()), "size": 0}] if inside else []

    def _file(self, place: list[str], revision: str) -> None:
        kind = place[0] if place[0] == "datasets" else "models"
        name = "/".join(place[1:] if kind == "datasets" else place)
        file = "/".join(self.path_parts[self.path_parts.index("resolve") + 2 :])
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        if repository.gated:
            self._json({"error": f"Access to {name} is restricted"}, 403, code="GatedRepo")
        elif file not in repository.files:
            self._json({"error": "Entry not found"}, 404, code="EntryNotFound", commit=repository.commit(revision))
        else:
            self._content(file, repository.files[file], repository.commit(revision))

    def _content(self, file: str, data: bytes, commit: str) -> None:
        start, stop, asked = 0, len(data), self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            stop = min(stop, len(data))
        part = data[start:stop]
        self.send_response(206 if asked else 200)
        etag = sha256(data) if large_file(file) else blob(data)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut and large_file(file):
            part = part[: self.hub.cut.pop(0)]
            self.close_connection = True
        self.wfile.write(part)

    def _create(self) -> None:
        body = json.loads(self.body)
        organization, _, name = body["name"].rpartition("/")
        full = f"{body.get('organization') or organization or 'owner'}/{name}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or not self.hub.writable:
            self._json({"error": "You don't have the rights to create a model"}, 403)
        elif ("models", full) in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.address}/{full}"}, 409)
        else:
            self.hub.add(full, {}, private=body.get("visibility") == "private" or bool(body.get("private")))
            self._json({"url": f"{self.hub.address}/{full}", "name": full, "id": "1"})

    def _lfs(self, name: str) -> None:
        if self._repository("models", name) is None:
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.address}/uploads/{item['oid']}", "header": {}}}
            objects.append({**item, **({} if item["oid"] in self.hub.uploads else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, repository: Repository, name: str) -> None:
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
        repository.commits.append(f"{len(repository.commits):040x}")
        url = f"{self.hub.address}/{name}/commit/{repository.commit()}"
        self._json({"success": True, "commitOid": repository.commit(), "commitUrl": url})

    def _json(
        self, value: Any, status: int = 200, *, code: str = "", commit: str = "", kind: str = "application/json"
    ) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", value["error"])
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def large_file(name: str) -> bool:
    return name.endswith(LARGE)


def mode(name: str) -> str:
    return "lfs" if large_file(name) else "regular"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A running server, and its state."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def connected(hub: Hub, cache: Path, *, token: str | None = TOKEN) -> Iterator[None]:
    """huggingface_hub and datasets in this process talk to `hub`, and keep their files in `cache`."""
    import datasets.config
    from huggingface_hub import constants

    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    values: dict[Any, dict[str, Any]] = {
        constants: {"ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
                    "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_DISABLE_XET": True,
                    "HF_TOKEN_PATH": str(cache / "token"),
                    "DOWNLOAD_CHUNK_SIZE": 4096},
        datasets.config: {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_DATASETS_OFFLINE": False,
                          "HUB_DATASETS_URL": hub.address + "/datasets/{repo_id}/resolve/{revision}/{path}",
                          "HF_MODULES_CACHE": str(cache / "modules")},
    }  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for module, entries in values.items():
            for name, value in entries.items():
                stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.dict("os.environ", {"HF_TOKEN": token} if token else {"HF_TOKEN": ""}))
        yield
