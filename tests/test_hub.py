"""pipelines.hub against a local stand-in of the Hub's HTTP API; huggingface_hub is the real one, in its own process."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import CLOSED, OPEN, Hub

ROOT = Path(__file__).resolve().parent.parent
CLIENT = """
import json, os, sys
from huggingface_hub import snapshot_download
from pipelines import ExportError, hub
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
    """[(function, arguments, token)] in one process that sees only this Hub -> [(error or "", answer or message)]."""
    env = {  # xet storage off: its client speaks to more than this Hub
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    } | env
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    run = [sys.executable, "-c", CLIENT]
    done = subprocess.run(run, input=json.dumps(calls), env=kept | env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hf_writer" not in done.stdout + done.stderr, "the token was shown"
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A folder as an export leaves it, with a large file, and things beside it that nobody wants to have sent."""
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# student\n")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "unet" / "model.safetensors").write_bytes(random.Random(0).randbytes(64_000))
    (folder / "unet" / "empty.txt").write_bytes(b"")
    wanted = contents(folder)
    for name in ("unet/model.safetensors.partial", "checkpoint-2/state.json", "x.tmp", ".unet.partial/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    return folder, wanted


def test_create_says_what_is_wrong_before_any_work(tmp_path):
    create = lambda token="hf_writer", **args: ("create", args, token)
    wrong = {
        "--push_to_hub needs a login, and there is none: run `hf auth login`": create(None, repo_id="student"),
        "--hub_model_id 'not a name' is no name": create(repo_id="not a name"),
        "answered 401": create("hf_expired", repo_id="student"),
        f"under the namespace '{CLOSED}'": create(repo_id=f"{CLOSED}/student"),
        "student cannot be created": create("hf_reader", repo_id="student"),
    }
    right = [create(repo_id="open"), create(repo_id=f"{OPEN}/hidden", private=True), create(repo_id="ada/open")]
    late = {
        "--hub_private: ada/open exists and is public": create(repo_id="ada/open", private=True),
        "ada/open cannot be written to": create("hf_reader", repo_id="ada/open"),
    }
    with Hub() as hub:
        said = client(hub.url, [*wrong.values(), *right, *late.values()], tmp_path)
        refused = said[: len(wrong)] + said[-len(late) :]
        for (kind, message), words in zip(refused, [*wrong, *late], strict=True):
            assert kind == "ValueError" and words in message and "\n" not in message, message
        assert said[len(wrong) : -len(late)] == [("", "ada/open"), ("", f"{OPEN}/hidden"), ("", "ada/open")]
        assert {name: repo.private for name, repo in hub.repos.items()} == {"ada/open": False, f"{OPEN}/hidden": True}
        assert [path for _, path in hub.seen].count("/api/whoami-v2") == len(said) - 2, "two are seen without asking"


def test_offline_and_out_of_reach(tmp_path):
    args = [("create", {"repo_id": "student"}, "hf_writer")]
    ((kind, message),) = client("http://127.0.0.1:9", args, tmp_path, HF_HUB_OFFLINE="1")
    assert kind == "ValueError" and "HF_HUB_OFFLINE=1" in message and "\n" not in message
    ((kind, message),) = client("http://127.0.0.1:9", args, tmp_path)
    assert kind == "ValueError" and "refused" in message.lower() and "\n" not in message


def test_what_is_pushed_comes_back_byte_for_byte(export, tmp_path):
    folder, wanted = export
    with Hub() as hub:
        push = ("push", {"folder": str(folder), "repo_id": "ada/student", "message": "Two steps"}, "hf_writer")
        down = ("download", {"repo_id": "ada/student", "local_dir": str(tmp_path / "down")}, "hf_writer")
        calls = [("create", {"repo_id": "ada/student", "private": True}, "hf_writer"), push, down, push]
        said = client(hub.url, calls, tmp_path)
        assert [kind for kind, _ in said] == ["", "", "", ""], said
        assert said[1][1] == said[3][1] == f"{hub.url}/ada/student"
        got = {k: v for k, v in contents(tmp_path / "down").items() if not k.startswith(".cache")}
        assert got == wanted and hub.repos["ada/student"].files == wanted
        assert hub.repos["ada/student"].lfs == {"unet/model.safetensors"}
        assert hub.repos["ada/student"].commits == ["Two steps"], "the same folder again is no new commit"

        hub.repos["ada/plain"] = type(hub.repos["ada/student"])()
        hub.lfs_from = 1 << 30
        push = ("push", push[1] | {"repo_id": "ada/plain"}, "hf_writer")
        ((kind, message),) = client(hub.url, [push], tmp_path, HF_HUB_DISABLE_XET="0")
        assert kind == "" and hub.repos["ada/plain"].files == wanted, "huggingface_hub's other way to send a folder"


@pytest.mark.parametrize(
    "failing",
    [
        {("POST", "ada/a/commit"): 500, ("POST", "ada/b/commit"): 409, ("POST", "ada/c/preupload"): 403},
        {("PUT", "/objects/"): 403},
    ],
    ids=["commit", "large file"],
)
def test_a_push_that_fails_is_one_message_and_the_export_stays(export, tmp_path, failing):
    folder, _ = export
    before = contents(folder)
    with Hub() as hub:
        hub.fail = {request: (status, "out of order") for request, status in failing.items()}
        calls = []
        for name in "abc"[: len(failing)]:
            calls.append(("create", {"repo_id": name}, "hf_writer"))
            calls.append(("push", {"folder": str(folder), "repo_id": f"ada/{name}"}, "hf_writer"))
        said = client(hub.url, calls, tmp_path)
        for (_, name), (kind, message), status in zip(said[::2], said[1::2], failing.values(), strict=True):
            assert kind == "HubError" and f"{name} failed: {hub.url} answered {status}, out of order;" in message
            assert f"`hf upload {name} {folder} .`" in message and "\n" not in message
            assert not hub.repos[name].files
    assert contents(folder) == before
