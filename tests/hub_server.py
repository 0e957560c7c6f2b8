"""The Hugging Face hub, as much of it as its own client asks for an upload and a download, on this machine.

A server of its API's addresses that keeps repositories in memory; what talks to it is `huggingface_hub`
itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token"
_REPO = r"/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"


class Repositories:
    """Attributes: `branches`, the files of every branch by (kind, owner/name); `commits`, what was said of
    each; `private`, which nobody sees without the token."""

    def __init__(self) -> None:
        self.branches: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.private: set[tuple[str, str]] = set()
        self.commits: list[tuple[str, str, str]] = []
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []

    def files(self, repo: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        return self.branches[kind, repo][revision]


def _commit_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories

    def log_message(self, *_) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def _json(self, value, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def _lacks(self, what: str) -> None:
        self._answer(404, b"{}", X_Error_Code=what, X_Error_Message=f"there is none: {what}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _branches(self, kind: str, repo: str):
        """Of a repository that the asker may see, else None."""
        key = (kind, repo)
        return None if key in self.repositories.private and not self._known else self._all.get(key)

    @property
    def _all(self):
        return self.repositories.branches

    def _find(self, branches, revision: str):
        """(Its commit, its files), by a branch's name or a commit."""
        for name, files in branches.items():
            if revision in (name, _commit_of(files)):
                return _commit_of(files), files
        return None

    # What the client asks

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.repositories.asked.append(path)
        if match := re.fullmatch(rf"/api{_REPO}(/revision/(?P<revision>.+))?", path):
            self._info(match["kind"], match["repo"], match["revision"] or "main")
        elif match := re.fullmatch(rf"/api{_REPO}/tree/(?P<revision>[^/]+).*", path):
            self._tree(match["kind"], match["repo"], match["revision"])
        elif match := re.fullmatch(
            r"/(?P<data>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path
        ):
            kind = "datasets" if match["data"] else "models"
            self._file(kind, match["repo"], match["revision"], match["file"])
        else:
            self._lacks("EntryNotFound")

    def _found(self, kind: str, repo: str, revision: str):
        """Its commit and files; None once the answer is that they aren't there."""
        branches = self._branches(kind, repo)
        found = None if branches is None else self._find(branches, revision)
        if found is None:
            self._lacks("RepoNotFound" if branches is None else "RevisionNotFound")
        return found

    def _info(self, kind: str, repo: str, revision: str) -> None:
        found = self._found(kind, repo, revision)
        if found is None:
            return
        commit, files = found
        siblings = [{"rfilename": name} for name in sorted(files)]
        self._json({"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, kind: str, repo: str, revision: str) -> None:
        found = self._found(kind, repo, revision)
        if found is None:
            return
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(found[1].items())
        ]
        self._json(entries)

    def _file(self, kind: str, repo: str, revision: str, name: str) -> None:
        found = self._found(kind, repo, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            return self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(
            200,
            content,
            X_Repo_Commit=commit,
            ETag=etag,
            Content_Length=str(len(content)),
            Connection="close",
        )
        self.close_connection = True

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.repositories.asked.append(path)
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._known:
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(rf"/api{_REPO}/branch/(?P<branch>.+)", path):
            branches = self._all[match["kind"], match["repo"]]
            taken = match["branch"] in branches
            branches.setdefault(match["branch"], dict(branches["main"]))
            self._answer(409 if taken else 200, b"{}")
        elif match := re.fullmatch(rf"/api{_REPO}/preupload/(?P<revision>.+)", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif re.fullmatch(r"/.*\.git/info/lfs/objects/batch", path):
            host = f"http://{self.headers['Host']}"
            self._json(
                {
                    "transfer": "basic",
                    "objects": [
                        each | {"actions": {"upload": {"href": f"{host}/large/{each['oid']}", "header": {}}}}
                        for each in json.loads(body)["objects"]
                    ],
                }
            )
        elif match := re.fullmatch(rf"/api{_REPO}/commit/(?P<revision>.+)", path):
            self._commit(match["kind"], match["repo"], match["revision"], body)
        else:
            self._lacks("EntryNotFound")

    def _create(self, wanted) -> None:
        kind = f"{wanted.get('type') or 'model'}s"
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        new = (kind, repo) not in self._all
        self._all.setdefault((kind, repo), {"main": {}})
        if new and (wanted.get("visibility") == "private" or wanted.get("private")):
            self.repositories.private.add((kind, repo))
        prefix = "datasets/" if kind == "datasets" else ""
        address = {"url": f"http://{self.headers['Host']}/{prefix}{repo}"}
        self._json(address, 200 if new else 409)

    def do_PUT(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.repositories.large[path.removeprefix("/large/")] = body
        self._answer(200)

    def _commit(self, kind: str, repo: str, revision: str, body: bytes) -> None:
        branch = self._all[kind, repo][revision]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.repositories.commits.append((repo, revision, value["summary"]))
            elif entry["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.repositories.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                branch[value["path"]] = content
        host = f"http://{self.headers['Host']}"
        commit = _commit_of(branch)
        self._json(
            {"commitUrl": f"{host}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None}
        )


@contextmanager
def serving():
    """(The server's address, its `Repositories`), for as long as the block lasts."""
    repositories = Repositories()
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
