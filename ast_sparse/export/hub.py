"""Upload a finished export to the Hugging Face hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError

from ast_sparse.errors import UserError, one_line, shown
from ast_sparse.storage import files
from ast_sparse.storage.base_card import is_hub_id

# Weights of an earlier upload under other names: transformers would prefer a `model.safetensors` to newer shards.
_STALE = ["model*.safetensors", "model.safetensors.index.json", f"{files.ADAPTER_FOLDER}/*"]


def check_push(repo_id: str) -> None:
    """Check what can be checked without the network, before an export that takes long.

    Raises:
        UserError: the id is malformed, the hub may not be asked, or there is no token.
    """
    if not is_hub_id(repo_id) or "/" not in repo_id:  # the hub would add USER/, which card and adapter would lack
        raise UserError(f"push_to_hub: {shown(repo_id)} is not a repository id. Use USER/NAME.", "push_to_hub")
    if is_offline_mode():
        raise UserError(
            f"push_to_hub: {repo_id} cannot be uploaded while HF_HUB_OFFLINE is set. Unset it.", "push_to_hub"
        )
    if get_token() is None:
        raise UserError(
            f"push_to_hub: {repo_id} needs a token of the Hugging Face hub, and there is none. Run `hf auth login`, or "
            "set HF_TOKEN.",
            "push_to_hub",
        )


def push_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder as a model repository in one commit, which also removes the weights of an earlier upload.

    Args:
        private: make a new repository private. One that is already public is refused.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub cannot be reached or refuses; the folder stays, and the message says how to upload it.
    """
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(repo.repo_id).private
        if not is_public:
            api.upload_folder(
                repo_id=repo.repo_id, folder_path=folder, commit_message="Upload an export of ast_sparse",
                delete_patterns=_STALE,
            )  # fmt: skip
    except Exception as error:  # of the hub, or of one of the HTTP libraries that its client has used
        raise UserError(
            f"push_to_hub: {repo_id} was not uploaded: {_reason(error)} The export is complete; upload it later with: "
            f"hf upload {repo_id} {shlex.quote(str(folder))}",
            "push_to_hub",
        ) from error
    if is_public:
        raise UserError(
            f"push_to_hub: {repo_id} exists and is public, so nothing was uploaded to it. Make it private, or use "
            f"another name: hf upload --private USER/NAME {shlex.quote(str(folder))}",
            "push_to_hub",
        )
    return str(repo)


def _reason(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the hub does not accept the token. Run `hf auth login`."
    if status == 403:
        return "the token may not write there. Use one with write access, or a repository of your own."
    if status is None and (isinstance(error, OSError) or type(error).__module__.startswith("httpx")):
        return f"the hub cannot be reached ({one_line(error, 120, cut='word', end='open')})."
    return one_line(error, 300, cut="word", end="stop")
