"""A stand-in of the Hub's HTTP API on this machine, for huggingface_hub itself to talk to: create, push, download.

Answers like a Hub without xet storage: small files come in the commit, large ones by the LFS protocol. Everything is
kept in memory. `fail` makes one kind of request fail: {(method, part of the path): (status, message)}.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[2]
USERS = {"hf_writer": ("ada", "write"), "hf_reader": ("ada", "read")}  # token: name, role
OPEN, CLOSED = "friends", "strangers"  # an organisation where ada may write, and one where she may not


@dataclass
class Repo:
    private: bool = False
    files: dict = field(default_factory=dict)  # path: bytes
    lfs: set = field(default_factory=set)  # the paths that came by LFS
    commits: list = field(default_factory=list)  # messages

    @property
    def sha(self):
        return hashlib.sha1(repr((sorted(self.files.items()), self.commits)).encode()).hexdigest()

    def oid(self, path):
        data = self.files[path]
        if path in self.lfs:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub`: hub.url, hub.repos, hub.seen (method and path of each request), hub.fail."""

    daemon_threads = True

    def __init__(self, lfs_from=10_000):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lfs_from = lfs_from  # bytes; larger files go by LFS
        self.repos, self.objects, self.seen, self.fail = {}, {}, [], {}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Refused(Exception):
    """status, message, and the code by which huggingface_hub tells errors apart."""


ROUTES = []


def route(method, pattern):
    """The method answers requests whose path fits; groups are its arguments. (name) is owner/name of a repository."""
    full = re.compile(pattern.replace("(name)", r"([\w.-]+/[\w.-]+)") + "$")
    return lambda f: ROUTES.append((method, full, f)) or f


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, path))
        try:
            for (method, part), refusal in self.server.fail.items():
                if method == self.command and part in path:
                    raise Refused(*refusal)
            for method, pattern, function in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (found := pattern.match(path)):
                    status, body, *headers = function(self, *found.groups())
                    return self.answer(status, body, **(headers[0] if headers else {}))
            raise Refused(404, f"no such address: {self.command} {path}")
        except Refused as refused:
            status, message, *code = refused.args
            extra = {"X_Error_Code": code[0]} if code else {}
            self.answer(status, {"error": message}, X_Error_Message=message, **extra)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def repo(self, name, write=False):
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and (name.split("/")[0] not in (self.user()[0], OPEN) or self.user()[1] != "write"):
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        name, role = self.user()
        return 200, {"type": "user", "name": name, "auth": {"accessToken": {"role": role}}}

    @route("POST", "/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        user, role = self.user()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner not in (user, OPEN) or role != "write":
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        answer = {"name": name, "url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return 409, answer | {"error": "You already created this model repo"}
        self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        return 200, answer

    @route("GET", "/api/models/(name)/auth-check/write")
    def may_write(self, name):
        self.repo(name, write=True)
        return 200, {}

    @route("GET", "/api/models/(name)(?:/revision/[^/]+)?")
    def info(self, name):
        repo = self.repo(name)
        files = [{"rfilename": path} for path in repo.files]
        return 200, {"id": name, "sha": repo.sha, "private": repo.private, "siblings": files, "tags": []}

    @route("GET", "/api/models/(name)/tree/[^/]+")
    def tree(self, name):
        repo, rows = self.repo(name), []
        for path, data in repo.files.items():
            row = {"type": "file", "path": path, "size": len(data), "oid": repo.oid(path)}
            big = {"oid": repo.oid(path), "size": len(data), "pointerSize": 130}
            rows.append(row | ({"lfs": big} if path in repo.lfs else {}))
        return 200, rows

    @route("POST", "/api/validate-yaml")
    def validate(self):
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {"errors": [], "warnings": warnings}

    @route("POST", "/api/models/(name)/preupload/[^/]+")
    def preupload(self, name):
        repo, rows = self.repo(name, write=True), []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["size"] >= self.server.lfs_from else "regular"
            known = {"oid": repo.oid(file["path"])} if file["path"] in repo.files else {}
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | known)
        return 200, {"files": rows}

    @route("POST", r"/(name)\.git/info/lfs/objects/batch")
    def batch(self, name):
        self.repo(name, write=True)
        rows = []
        for row in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/objects/{row['oid']}"}}
            rows.append(row | ({} if row["oid"] in self.server.objects else {"actions": upload}))
        return 200, {"transfer": "basic", "objects": rows}

    @route("PUT", "/objects/([0-9a-f]{64})")
    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content does not have this hash")
        self.server.objects[oid] = self.body
        return 200, {}

    @route("POST", "/api/models/(name)/commit/[^/]+")
    def commit(self, name):
        repo, lines = self.repo(name, write=True), [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    repo.commits.append(value["summary"])
                case "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.server.objects:
                        raise Refused(400, f"{value['path']} was never uploaded")
                    repo.files[value["path"]] = self.server.objects[value["oid"]]
                    repo.lfs.add(value["path"])
                case other:
                    raise Refused(400, f"unknown operation {other}")
        return 200, {"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha}

    @route("GET", "/(name)/resolve/[^/]+/(.+)")
    def resolve(self, name, path):
        repo = self.repo(name)
        if path not in repo.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data, etag = repo.files[path], f'"{repo.oid(path)}"'
        sent = {"ETag": etag, "X_Repo_Commit": repo.sha, "X_Linked_Size": str(len(data)), "X_Linked_Etag": etag}
        return 200, data, sent | {"Content_Type": "application/octet-stream"}


def environment(url, home, **env):
    """Of a process that sees only this Hub: huggingface_hub reads it when it is imported."""
    env = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # its client speaks to more than this Hub
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    } | env
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | env


CLIENT = """
import json, os, sys
from huggingface_hub import snapshot_download
from pipelines.components import ExportError
from pipelines.export import hub
for name, args, token in json.load(sys.stdin):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    call = snapshot_download if name == "download" else getattr(hub, name)
    try:
        said = ["", call(**args)]
    except (ValueError, ExportError) as error:  # what a recipe's main tells the user
        said = [type(error).__name__, str(error)]
    sys.stdout.write(json.dumps(said) + chr(10))
"""


def client(url, calls, home, **env):
    """[(function of hub.py, arguments, token)] in a process of its own -> [(error or "", answer or message)]."""
    run, env = [sys.executable, "-c", CLIENT], environment(url, home, **env)
    done = subprocess.run(run, input=json.dumps(calls), env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not any(token in done.stdout + done.stderr for token in USERS), "a token was shown"
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]
