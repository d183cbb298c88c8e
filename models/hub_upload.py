"""Upload a shared run to the Hugging Face Hub."""

from pathlib import Path

from data.download import HUB_NAME
from models.hub_run import FILES


def check_upload(name: str, *, private: bool, overwrite: bool) -> None:
    """Check, before minutes of work, that a repository can be written to: OWNER/NAME, login, and what is there now.

    Raises ValueError without a login, if the repository has files and not `overwrite`, or if it is public and `private`
    is asked for; ConnectionError if the hub does not respond.
    """
    from huggingface_hub import HfApi, get_token

    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"--hub must be OWNER/NAME, got {name!r}")
    if get_token() is None:
        raise ValueError("not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        api.whoami()  # an expired token reads like a missing repository
        if not api.repo_exists(name):
            return
        info = api.model_info(name)
    except Exception as error:  # huggingface_hub and its network library raise many types
        raise upload_error(name, error) from None
    files = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]
    if files and not overwrite:
        raise ValueError(f"{name} exists on the hub, with {len(files)} files: add --overwrite, or choose another name")
    if private and not info.private:
        raise ValueError(f"{name} exists on the hub and is public: make it private there, or leave out --private")


def upload_run(folder: Path, name: str, *, private: bool) -> str:
    """Upload the folder of a shared run as one commit, and return the repository's address.

    Files of an earlier shared run that this one does not have are deleted: they belong to other weights.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(FILES),
            delete_patterns=list(FILES),
            commit_message="Share a trained image-text retrieval model",
        )
    except Exception as error:
        raise upload_error(name, error) from None
    return str(address)


def upload_error(name: str, error: Exception) -> Exception:
    """Convert an error of huggingface_hub to a ConnectionError or ValueError of one line."""
    from huggingface_hub import constants

    reason = " ".join(str(error).split())[:200] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ValueError(
            f"the hub refuses to write to {name} with this token: check the owner, or log in with a token with write "
            f"access (hf auth login): {reason}"
        )
    return ConnectionError(f"{name} could not be written on {constants.ENDPOINT}: {reason}; try again")
