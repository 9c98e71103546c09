"""A published folder on the Hugging Face Hub.

Enter: a folder that `publish_model` put in place, and a repository name. Leave: the address of the commit.
Refused: a folder that differs from its checksums, no token in HF_TOKEN, a hub that says no. The token is read from the
environment alone, so that it stands in no config, log or shell history.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import HfApi

from mmpretrain.publishing.facts import PublishError
from mmpretrain.publishing.folder import check_sums


def upload(folder: Path, repository: str, private: bool = False, env: Mapping[str, str] | None = None) -> str:
    """Create the repository if it is missing and upload the folder in one commit."""
    env = os.environ if env is None else env
    token = env.get("HF_TOKEN")
    if not token:
        raise PublishError("no HF_TOKEN in the environment; set it to a write token of the hub, then publish again")
    check_sums(folder)
    api = HfApi(endpoint=env.get("HF_ENDPOINT"), token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Publish {folder.name} with mmpretrain"
        )
    except (HTTPError, ValueError) as error:
        raise PublishError(
            f"the hub did not take {repository}: {error}; the folder {folder} is complete and can be uploaded again"
        ) from error
    return str(commit.commit_url)
