"""Push a pipeline folder to the Hugging Face Hub. The repository is created before the work, files are uploaded after
it.

There is no option for a token, so that no configuration, log or command line contains one. huggingface_hub finds it
where `hf auth login` stored it, or in HF_TOKEN. huggingface_hub also repeats failed transfers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.components import ExportError

IGNORE = ("checkpoint-*", "*.partial", "*.partial/*", "*.tmp", "*.incomplete", "*.lock", "*__pycache__*")


class HubError(ExportError):
    """A push to the Hub failed. The local folder is unchanged."""


def create_repository(repo_id: str, private: bool = False) -> str:
    """Create or find the model repository, check write access, and return its full name "owner/name".

    repo_id: "owner/name", or "name" for the user's own. private: create it as private; without it the owner's settings
    decide. Call it before any work. A ValueError says if nobody is logged in, the name is invalid, the owner or the
    token does not allow it, a repository that should be private is public, or the Hub is not reachable.
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
    """Upload a folder to a repository from `create_repository`, and return the repository's address.

    Checkpoints and incomplete files (IGNORE) are not uploaded. HubError if the Hub refuses the upload. The folder is
    only read, so that the upload can be repeated later.
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
    """Turn any error inside, of files, network or server, into one message: what failed, why, and what to do."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {_reason(error)}; {then}") from error


def _reason(error: BaseException) -> str:
    """One line: the server's answer, or the first line of the innermost error."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE=1 is set, so nothing may be sent"
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            said = link.server_message or link.response.reason_phrase
            return f"{os.environ.get('HF_ENDPOINT', 'the Hub')} answered {status}, {said}"
    lines = str(chain[-1]).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(chain[-1]).__name__
