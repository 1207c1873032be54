"""A Hugging Face Hub for the tests: models only, in memory, over the HTTP that `huggingface_hub` speaks.

    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        ...  # a client with HF_ENDPOINT=hub.endpoint and HF_TOKEN=hf_alice

Binary files go the way of Git LFS and come back by a redirect, as on the real Hub. The newer Xet storage is not spoken:
no answer offers it, and a client that has `hf_xet` uploads LFS files nowhere else unless HF_HUB_DISABLE_XET=1. With
`lfs=False` every file travels inside the commit, and either client is content.

`hub.cut(...)` makes the server drop connections in the middle, as a bad network does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name of the blob: of the file, or of the pointer that stands for it."""
        data = self.data
        if self.lfs:
            head = "version https://git-lfs.github.com/spec/v1"
            data = f"{head}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    commits: list[Commit]
    branches: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def files(self) -> dict[str, bytes]:
        """Path -> content on the main branch."""
        return {path: file.data for path, file in self.at("main").files.items()}

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        names = {path: file.blob_id for path, file in sorted(files.items())}
        parent = self.branches.get(branch)
        oid = hashlib.sha1(json.dumps([len(self.commits), parent, message, names]).encode()).hexdigest()
        commit = Commit(oid, message, files)
        self.commits.append(commit)
        self.branches[branch] = oid
        return commit


@dataclass
class _Cut:
    method: str
    path: str
    after: int
    times: int


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: object) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


class HubServer:
    """The state of the hub, and the thread that serves it.

    Args:
        tokens: token -> user name; the token may write to the user's repositories.
        lfs: whether binary files go to LFS storage.
    """

    def __init__(self, tokens: dict[str, str], lfs: bool = True) -> None:
        self.tokens, self.lfs = tokens, lfs
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []  # requests that nothing here answers
        self.lock = threading.RLock()
        self._cuts: list[_Cut] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def cut(self, method: str, path: str, after: int, times: int) -> None:
        """Drop the connection `times` times, `after` so many bytes of the body, where the path matches."""
        with self.lock:
            self._cuts.append(_Cut(method, path, after, times))

    def mend(self) -> None:
        with self.lock:
            self._cuts.clear()

    def next_cut(self, method: str, path: str) -> int | None:
        with self.lock:
            for cut in self._cuts:
                if cut.times and cut.method == method and re.search(cut.path, path):
                    cut.times -= 1
                    return cut.after
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names that http.server looks for

    # ---- requests ----

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        try:
            self.body = self._read_body()
        except ConnectionError:
            return self._drop()
        with self.hub.lock:
            self.hub.requests.append((self.command, self.route))
            try:
                self._dispatch()
            except HubError as error:
                headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
                self._json(error.body | {"error": str(error)}, error.status, headers)
        return None

    def _read_body(self) -> bytes:
        limit = self.hub.next_cut(self.command, self.path) if self.command in ("POST", "PUT") else None
        body = b""
        for chunk in self._chunks():
            body += chunk
            if limit is not None and len(body) >= limit:
                raise ConnectionError
        if limit is not None:
            raise ConnectionError
        return body

    def _chunks(self, size: int = 1024) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            if not (chunk := self.rfile.read(min(size, left))):
                raise ConnectionError  # the client went away
            left -= len(chunk)
            yield chunk

    def _drop(self) -> None:
        # closed with a reset, so that the client notices at once even while it is still sending
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    # ---- answers ----

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.next_cut(self.command, self.path) if self.command == "GET" else None
        if limit is not None:
            self.wfile.write(body[:limit])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
            return
        self.wfile.write(body)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    # ---- who asks, for what ----

    @property
    def user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self.user, self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and user != owner:
            raise HubError(403, f"you have no right to write to {repo_id}")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(unquote(revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return commit

    def _dispatch(self) -> None:
        for method, pattern, handler in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, self.route)):
                return handler(self, **match.groupdict())
        self.hub.unknown.append((self.command, self.route))
        raise HubError(404, f"this hub has no {self.command} {self.route}")

    # ---- accounts and repositories ----

    def whoami(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        self._json({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or self.user}/{asked['name']}"
        if repo_id.split("/")[0] != self.user:
            raise HubError(403, f"you have no right to create {repo_id}")
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", url=url)
        repo = Repo(asked.get("visibility") == "private" or asked.get("private", False), [], {})
        repo.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self.hub.repos[repo_id] = repo
        self._json({"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self._json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def create_branch(self, repo_id: str, name: str) -> None:
        repo, name = self._repo(repo_id, write=True), unquote(name)
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: {name}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.branches[name] = self._commit(repo, start).oid
        self._json({})

    def create_tag(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        repo.tags[json.loads(self.body)["tag"]] = self._commit(repo, revision).oid
        self._json({})

    # ---- uploads: modes, LFS, commit ----

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self._commit(self._repo(repo_id, write=True), revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            known = files.get(path)
            mode = "lfs" if self.hub.lfs and path.endswith(LFS_SUFFIXES) else "regular"
            answers.append(
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known.etag if known else None}
            )
        self._json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.storage:
                href = f"{self.hub.endpoint}/lfs/{asked['oid']}"
                verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"}
                answer["actions"] = {"upload": {"href": href}, "verify": verify}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content does not have the promised SHA-256")
        self.hub.storage[oid] = self.body
        self._json({})

    def lfs_verify(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        asked = json.loads(self.body)
        if len(self.hub.storage.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, "the object was not uploaded")
        self._json({})

    def commit(self, repo_id: str, revision: str) -> None:
        repo, branch = self._repo(repo_id, write=True), unquote(revision)
        files = dict(self._commit(repo, branch).files)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise HubError(400, f"LFS pointer of '{path}' points to an object that was not uploaded")
                files[path] = File(self.hub.storage[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                del files[path]
            elif line["key"] == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path)}
            else:
                raise HubError(400, f"unknown operation {line['key']}")
        oid = repo.commit(branch, header["summary"], files).oid
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"})

    # ---- what is there ----

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision)
        readme = commit.files.get("README.md")
        data = card_metadata(readme.data.decode()) if readme else {}
        self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.oid,
                "private": repo.private,
                "library_name": data.get("library_name"),
                "tags": data.get("tags", []),
                "cardData": data,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def refs(self, repo_id: str) -> None:
        repo = self._repo(repo_id)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags), "converts": ("refs", {})}
        self._json(
            {
                kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in known.items()]
                for kind, (ref, known) in kinds.items()
            }
        )

    def tree(self, repo_id: str, revision: str, path: str | None = None) -> None:
        files = self._commit(self._repo(repo_id), revision).files
        folder = f"{unquote(path)}/" if path else ""
        found = {name: file for name, file in files.items() if name.startswith(folder)}
        if not found:
            raise HubError(404, f"{unquote(path or '')} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, object]] = {}
        for name, file in sorted(found.items()):
            first, *deeper = name.removeprefix(folder).split("/")
            if deeper and not recursive:
                entries[folder + first] = {"type": "directory", "path": folder + first, "oid": "0" * 40, "size": 0}
                continue
            lfs = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}} if file.lfs else {}
            entries[name] = {"type": "file", "path": name, "oid": file.blob_id, "size": len(file.data), **lfs}
        self._json(list(entries.values()))

    # ---- downloads ----

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit(self._repo(repo_id), revision)
        here = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(unquote(path))
        if file is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._json({"error": "Entry not found"}, 404, here | code)
        if file.lfs:
            linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
            # another name for this host: what the client takes for storage elsewhere, which needs no login
            storage = self.hub.endpoint.replace("127.0.0.1", "localhost")
            return self._send(302, b"", here | linked | {"Location": f"{storage}/lfs/{file.sha256}"})
        return self._content(file.data, here | {"ETag": f'"{file.etag}"'})

    def lfs_download(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "the token was sent to the storage, which is not the Hub")
        if oid not in self.hub.storage:
            raise HubError(404, "no such object")
        self._content(self.hub.storage[oid], {"ETag": f'"{oid}"'})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return self._send(206, data[first : last + 1], headers | part)


_REPO, _REV = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create_repo),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), f"/api/models/{_REPO}/branch/(?P<name>[^/]+)", _Handler.create_branch),
    (("POST",), f"/api/models/{_REPO}/tag/{_REV}", _Handler.create_tag),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REV}", _Handler.preupload),
    (("POST",), f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("POST",), f"/{_REPO}\\.git/info/lfs/verify", _Handler.lfs_verify),
    (("PUT",), r"/lfs/(?P<oid>\w+)", _Handler.lfs_upload),
    (("GET", "HEAD"), r"/lfs/(?P<oid>\w+)", _Handler.lfs_download),
    (("POST",), f"/api/models/{_REPO}/commit/{_REV}", _Handler.commit),
    (("GET",), f"/api/models/{_REPO}", _Handler.model_info),
    (("GET",), f"/api/models/{_REPO}/revision/{_REV}", _Handler.model_info),
    (("GET",), f"/api/models/{_REPO}/refs", _Handler.refs),
    (("GET",), f"/api/models/{_REPO}/tree/{_REV}(?:/(?P<path>.+))?", _Handler.tree),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
)


def card_metadata(content: str) -> dict[str, object]:
    block = re.match(r"---\n(.*?)\n---", content, flags=re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse of a model card's metadata: of its rules, those a result can break."""
    data = card_metadata(content)
    errors = [
        f'"{name}" must be a list' for name in ("tags", "model-index") if not isinstance(data.get(name, []), list)
    ]
    for model in data.get("model-index", []) if not errors else []:
        for result in model.get("results", []):
            if not result.get("task", {}).get("type"):
                errors.append('"model-index[0].results[0].task.type" is required')
            if not {"type", "name"} <= result.get("dataset", {}).keys():
                errors.append('"model-index[0].results[0].dataset" needs a type and a name')
            if not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [{}])):
                errors.append('"model-index[0].results[0].metrics" need a type and a value')
    return errors
