"""A pipeline folder on the Hugging Face Hub: the repository is made before the work, the files are sent after it.

There is no option for a token: huggingface_hub finds it where `hf auth login` left it or in HF_TOKEN, so that it can
stand in no configuration, log or command line. Retries of transfers are huggingface_hub's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.components import ExportError

IGNORE = ("checkpoint-*", "*.partial", "*.partial/*", "*.tmp", "*.incomplete", "*.lock", "*__pycache__*")


class HubError(ExportError):
    """A push did not arrive on the Hub; the local folder is as it was."""


def create_repository(repo_id: str, private: bool = False) -> str:
    """Make the model repository, or find it, and see that it can be written to; its full name, "owner/name".

    repo_id: "owner/name", or "name" for one's own. private: without it a new repository is what its owner's settings
    say. To be called before any work: a ValueError, one message, if nobody is logged in, the name is not possible, the
    owner or the token does not allow it, a repository that should be private is public, or the Hub is out of reach.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {repo_id!r} is not a repository name: {_reason(error)}") from None
    if get_token() is None:
        raise ValueError(
            "--push_to_hub needs a login, and there is none: run `hf auth login` or set HF_TOKEN to a token that may "
            "write (https://huggingface.co/settings/tokens), or leave --push_to_hub out"
        )
    api = HfApi(library_name="distill")
    check = "check the network, or log in anew with `hf auth login`"
    with _report_as("--push_to_hub: nobody could be logged in", ValueError, check):
        api.whoami()
    choose = "choose a --hub_model_id that you may write to, with a token of that right"
    with _report_as(f"--push_to_hub: {repo_id} cannot be created", ValueError, choose):
        name = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    with _report_as(f"--push_to_hub: {name} cannot be written to", ValueError, choose):
        api.auth_check(name, write=True)
        public = private and not api.model_info(name).private
    if public:
        raise ValueError(f"--hub_private: {name} exists and is public; make it private or choose another name")
    return name


def push_folder(folder: str | Path, repo_id: str, message: str = "Upload the student") -> str:
    """Send a folder to a repository that `create` returned; the address of the repository.

    Checkpoints and half-written files (IGNORE) stay here. HubError, one message, if the Hub does not take it; the
    folder is only read, so that the same can be tried again later.
    """
    from huggingface_hub import HfApi

    if not (Path(folder) / "README.md").is_file():
        raise ValueError(f"{folder} is not an exported folder: it has no README.md; export it first")
    again = f"the export in {folder} is complete; send it later with `hf upload {repo_id} {folder} .`"
    with _report_as(f"the push to {repo_id} failed", HubError, again):
        api = HfApi(library_name="distill")
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=list(IGNORE)
        )
    return str(done.repo_url)


@contextmanager
def _report_as(what: str, kind: type[Exception], then: str) -> Iterator[None]:
    """Whatever goes wrong inside, files or network or server, as one message: what, why, and what to do."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {_reason(error)}; {then}") from error


def _reason(error: BaseException) -> str:
    """One line: what the server answered, or the first line of the innermost error."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE=1 is set, so nothing may be sent"
        if isinstance(link, HfHubHTTPError):
            status, said = link.response.status_code, link.server_message or link.response.reason_phrase
            return f"{os.environ.get('HF_ENDPOINT', 'the Hub')} answered {status}, {said}"
    lines = str(chain[-1]).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(chain[-1]).__name__
