"""A stand-in of the Hugging Face hub, on this machine: the few paths of its HTTP interface that models need.

Repositories with commits and branches, private ones that ask for a token, regular files in commits and large ones by
the LFS protocol. What a client asked for is kept in `Hub.asked`.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


@dataclass
class Repository:
    """Commits by their hash, each with all its files; branches by name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[name] = files
        self.messages.append(message)
        self.branches[branch] = name
        return name


class Hub:
    """The server, which runs while the context is open."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.full = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **options: bool) -> str:
        """A repository with a first commit, whose hash comes back."""
        self.repositories[name] = repository = Repository(**options)
        return repository.commit("main", files, "first")

    def at(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a repository's branch."""
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def fetched(self) -> list[str]:
        """The files whose content was sent."""
        return [path.split("/", 5)[5] for method, path in self.asked if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append((self.command, unquote(path)))
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self.of_model("/".join(parts[2:4]), parts[4:])
        elif parts == ["api", "repos", "create"]:
            self.create()
        elif parts == ["api", "validate-yaml"]:
            self.answer(200, {"warnings": [], "errors": []})
        elif parts[0] == "lfs":
            self.hub.large[parts[1]] = self.body
            self.answer(200)
        elif parts[2:3] == ["resolve"]:
            self.of_model("/".join(parts[:2]), parts[2:])
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            wanted = json.loads(self.body)["objects"]
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}} for each in wanted
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        else:
            self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.is_allowed():
            self.answer(401, {"error": "Invalid username or password."})
        elif name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            is_private = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.add(name, {".gitattributes": b""}, private=is_private)
            self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def of_model(self, name: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.is_allowed()):
            self.answer(401 if repository else 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif self.command == "POST":
            self.write(name, *rest)
        else:
            verb, revision = rest[:2] if rest else ("revision", "main")
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            elif verb == "revision":
                self.answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": []})
            else:
                self.read(repository, commit, verb, "/".join(rest[2:]))

    def read(self, repository: Repository, commit: str, verb: str, path: str) -> None:
        files = repository.commits[commit]
        if verb == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            self.answer(200, listed)
        elif repository.gated and not self.is_allowed():
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
        elif path not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        else:
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer(200, files[path], ETag=etag, X_Repo_Commit=commit)

    def write(self, name: str, verb: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        if not self.is_allowed():
            self.answer(403, {"error": "Forbidden"}, X_Error_Message="you need write access")
        elif self.hub.full:
            self.answer(402, {"error": "storage limit reached"}, X_Error_Message="storage limit reached")
        elif verb == "branch":
            if revision in repository.branches:
                self.answer(409, {"error": "Reference already exists"})
            else:
                repository.branches[revision] = repository.branches["main"]
                self.answer(200, {})
        elif verb == "preupload":
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": modes})
        elif revision not in repository.branches:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        else:
            files, message = dict(repository.commits[repository.branches[revision]]), ""
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "header":
                    message = value["summary"]
                elif operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                else:
                    del files[value["path"]]
            commit = repository.commit(revision, files, message)
            self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
