"""Sharing models on the Hugging Face Hub."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from mot_hf.hub_files import find_changed_code, find_code, list_files, list_others
from mot_hf.modeling.heads_mot import AUTO_MAP
from mot_hf.reporting.card import CARD_NAME, address_card, is_generated, write_card
from mot_hf.storage.checkpoint_files import name_some
from mot_hf.storage.model_files import CODE_FILES
from mot_hf.storage.saved_model import SavedModel, read_model
from mot_hf.version import __version__

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?(\.calibrated-[0-9a-f]{8})?\.safetensors(\.index\.json)?")
# httpx raises this if there is no answer, in whichever version huggingface_hub uses.
_NoAnswerError = cast(type[Exception], HfHubHTTPError.__bases__[0])


def push_model(
    model_dir: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads a MoT model with its code, card and, if it has one, its tokenizer, in one commit.

    Nothing shows up on the Hub until everything has arrived, and a repeated upload does not send again what arrived
    before. Weight files of an earlier model that the new one does not use are deleted. Only the model's own files are
    uploaded, see [`list_files`]; the log names everything else in the folder (checkpoints, logs, optimizer states,
    hidden files). `model_dir` does not change: a missing card or missing code is made for the upload.

    Args:
        model_dir (`str` or `os.PathLike`): Folder of the model.
        repo_id (`str`): Name on the Hub, such as `"me/my-model"`.
        private (`bool`, *optional*, defaults to `False`): Whether to create the repository as private, and to refuse
            one that exists and is public. By default your account's setting for new repositories decides.
        revision (`str`, *optional*): Branch to upload to, created if it does not exist. Defaults to the main branch.
        message (`str`, *optional*): Commit message.

    Returns:
        `str`: The URL of the model.

    Raises:
        OSError: A file of the model is missing, the Hub cannot be reached, or it refuses the upload.
        ValueError: The folder holds no complete MoT model, its files name other people's code or lead out of the
            folder, `repo_id` is not a valid name, or `private` is true and the repository is public.
    """
    saved = read_model(model_dir)
    own_files = list_files(saved)
    _tell_others(saved.reader.folder, own_files)
    if not saved.has_tokenizer:
        logger.warning("%s holds no tokenizer: the model is uploaded without one.", model_dir)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder, _explain_failures(repo_id):
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo.repo_id).private:  # one that exists keeps its visibility
            raise ValueError(
                f"`private=True`, but {repo.repo_id!r} exists and is public: make it private on the Hub first, or "
                "choose another name. Nothing was uploaded."
            )
        files = own_files | _make_missing_files(saved, own_files, Path(folder), repo.repo_id)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo.repo_id, revision=revision)
        outdated = {name for name in present if _WEIGHTS.fullmatch(name)} - files.keys()
        api.create_commit(
            repo.repo_id,
            [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            + [CommitOperationDelete(name) for name in sorted(outdated)],
            commit_message=message or "Upload model",
            revision=revision,
        )
    return f"{repo.url}/tree/{revision}" if revision else repo.url


def _tell_others(folder: Path, files: Mapping[str, Path]) -> None:
    """Log what is not uploaded, and which uploaded code someone should check."""
    if others := list_others(folder, {*files, *CODE_FILES}):
        logger.warning("Not uploaded from %s, because it is not part of the model: %s.", folder, name_some(others))
    code = find_code(folder)
    if changed := find_changed_code(folder, code or ()):
        logger.warning(
            "The code in %s differs from that of mot_hf %s (%s), and is uploaded as it is. If you did not change it, "
            "and no other version saved the model, delete these files; the upload then contains the right ones.",
            folder,
            __version__,
            name_some(changed),
        )


def _make_missing_files(saved: SavedModel, files: Mapping[str, Path], folder: Path, repo_id: str) -> dict[str, Path]:
    """Make what the model lacks in `folder`: the code with the names of all heads, and a card with its new address."""
    model_dir, auto_map = saved.reader.folder, saved.reader.config.get("auto_map") or {}
    has_code = find_code(model_dir) is not None
    if not (has_code and isinstance(auto_map, dict) and auto_map.items() >= AUTO_MAP.items()):
        saved.model.config.save_pretrained(folder)
        for name in CODE_FILES if has_code else ():
            (folder / name).unlink()
    card, own = folder / CARD_NAME, files.get(CARD_NAME)
    if own is None:
        write_card(model_dir, output=card, model_id=repo_id)
    elif is_generated(text := own.read_text(encoding="utf-8", errors="replace")):
        card.write_text(address_card(text, repo_id), encoding="utf-8")
    return {path.name: path for path in folder.iterdir()}


@contextmanager
def _explain_failures(repo_id: str) -> Iterator[None]:
    """Say what to do about an error of the Hub, or about no answer."""
    again = "Repeat the command: what has arrived is not sent again, and nothing is visible until all of it is there."
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise OSError(
                f"The Hub does not let you write to {repo_id!r} ({error.response.status_code}): log in with `hf auth "
                "login`, or set HF_TOKEN to a token with the permission to write there."
            ) from error
        raise OSError(f"The Hub refused {repo_id!r}: {error} {again}") from error
    except _NoAnswerError as error:
        raise OSError(f"The Hub did not answer ({error}): is there a connection to it? {again}") from error
    except RuntimeError as error:  # of huggingface_hub, for one large file
        raise OSError(f"{error} {again}") from error
