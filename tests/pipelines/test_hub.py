"""hub.py against a local stand-in of the Hub's HTTP API; huggingface_hub is the real one, in its own process."""

import random
from pathlib import Path

import pytest
from hub_server import CLOSED, OPEN, Hub, client


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
    create = lambda token="hf_writer", **args: ("create_repository", args, token)
    wrong = {
        "--push_to_hub needs a login, and there is none: run `hf auth login`": create(None, repo_id="student"),
        "--hub_model_id 'not a name' is not a repository name": create(repo_id="not a name"),
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
    args = [("create_repository", {"repo_id": "student"}, "hf_writer")]
    ((kind, message),) = client("http://127.0.0.1:9", args, tmp_path, HF_HUB_OFFLINE="1")
    assert kind == "ValueError" and "HF_HUB_OFFLINE=1" in message and "\n" not in message
    ((kind, message),) = client("http://127.0.0.1:9", args, tmp_path)
    assert kind == "ValueError" and "refused" in message.lower() and "\n" not in message


def test_what_is_pushed_comes_back_byte_for_byte(export, tmp_path):
    folder, wanted = export
    with Hub() as hub:
        push = ("push_folder", {"folder": str(folder), "repo_id": "ada/student", "message": "Two steps"}, "hf_writer")
        down = ("download", {"repo_id": "ada/student", "local_dir": str(tmp_path / "down")}, "hf_writer")
        calls = [("create_repository", {"repo_id": "ada/student", "private": True}, "hf_writer"), push, down, push]
        said = client(hub.url, calls, tmp_path)
        assert [kind for kind, _ in said] == ["", "", "", ""], said
        assert said[1][1] == said[3][1] == f"{hub.url}/ada/student"
        got = {k: v for k, v in contents(tmp_path / "down").items() if not k.startswith(".cache")}
        assert got == wanted and hub.repos["ada/student"].files == wanted
        assert hub.repos["ada/student"].lfs == {"unet/model.safetensors"}
        assert hub.repos["ada/student"].commits == ["Two steps"], "the same folder again is no new commit"

        hub.repos["ada/plain"] = type(hub.repos["ada/student"])()
        hub.lfs_from = 1 << 30
        push = ("push_folder", push[1] | {"repo_id": "ada/plain"}, "hf_writer")
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
            calls.append(("create_repository", {"repo_id": name}, "hf_writer"))
            calls.append(("push_folder", {"folder": str(folder), "repo_id": f"ada/{name}"}, "hf_writer"))
        said = client(hub.url, calls, tmp_path)
        for (_, name), (kind, message), status in zip(said[::2], said[1::2], failing.values(), strict=True):
            assert kind == "HubError" and f"{name} failed: {hub.url} answered {status}, out of order;" in message
            assert f"`hf upload {name} {folder} .`" in message and "\n" not in message
            assert not hub.repos[name].files
    assert contents(folder) == before
