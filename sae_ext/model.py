"""The sparse autoencoder as a user holds it, and the folder it is kept in.

    pre = (x - b_dec) W_enc + b_enc      z = activation(pre)      x̂ = output(z W_dec + b_dec)

The folder is in the layout of SAELens 6: `cfg.json` and `sae_weights.safetensors` with
`W_enc [d_in, d_sae]`, `b_enc`, `W_dec [d_sae, d_in]`, `b_dec`, and what the architecture has beside
them. SAELens knows no upper clip and no output activation: both stand in the metadata, which it ignores.
A folder that it is sure to read as what it is comes from `sae_ext.interchange.saelens`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_ext import arguments, ops
from sae_ext.architectures import LAYOUTS, Architecture, ReLU
from sae_ext.errors import UserError

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# The oldest file layout version under which SAELens reads the metadata instead of migrating it.
_SAELENS_LAYOUT = "6.0.0"
_CLIP_LENGTH = "activation_clip_decoder_norm"
_PLAIN = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
"""The settings of SAELens under which its numbers are those of the equations above."""
_VECTORS: dict[str, tuple[str, ...]] = {"standard": (), "topk": (), "jumprelu": ("threshold",)}
"""Names of the tensors [d_sae] beside the four, in the layouts of SAELens."""

Output = Literal["identity", "sigmoid", "tanh"]


@dataclass
class SAE:
    """A sparse autoencoder for raw activations (any scaling used in training is folded in)."""

    parameters: ops.Parameters
    architecture: Architecture = field(default_factory=ReLU)
    more: dict[str, Tensor] = field(default_factory=dict)
    """What the architecture learned beside the four, such as thresholds."""
    output: Output = "identity"
    """Applied to z W_dec + b_dec."""

    FILES: ClassVar[tuple[str, str]] = (CFG_FILE, WEIGHTS_FILE)

    @property
    def clip(self) -> float | None:
        """Upper bound of activations; None for none."""
        return self.architecture.clip

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.architecture.d_in(self.parameters, self.more)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.parameters.W_dec.shape[0])

    def to(self, device: str | torch.device) -> SAE:
        """The same on another device; its own tensors where it is there already."""
        tensors = {name: t.to(device) for name, t in self.parameters.tensors().items()}
        more = {name: t.to(device) for name, t in self.more.items()}
        return replace(self, parameters=ops.Parameters(**tensors), more=more)

    def encode(self, x: Tensor) -> ops.SparseCode:
        """The sparse code of rows x [B, d_in].

        Raises:
            UserError: x has another width than the SAE.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UserError(
                f"activations are {list(x.shape)}, but the SAE reads rows of width d_in = {self.d_in}"
            )
        read = self.architecture.read(x, self.more)
        if len(read) == 0:  # there is nothing to choose among
            return ops.encode(read, self.parameters)
        return self.architecture.encode(read, self.parameters, self.more)

    def decode(self, code: ops.SparseCode) -> Tensor:
        """Reconstruction [B, d_in] of a sparse code."""
        x_hat = activated(ops.decode(code, self.parameters), self.output)
        return self.architecture.write(x_hat, self.more)

    def target(self, x: Tensor) -> Tensor:
        """What `decode` approximates for rows x."""
        return self.architecture.target(x, self.more)

    def encoder_decoder_cosine(self) -> Tensor:
        """cos(W_enc[:, j], W_dec[j]) for each feature, [d_sae]."""
        return torch.cosine_similarity(self.parameters.W_enc_rows, self.parameters.W_dec, dim=1)

    def files(self, metadata: dict[str, Any]) -> dict[str, bytes]:
        """The two files of the folder; `metadata` says what the activations are and what was measured."""
        p = self.parameters
        tensors = {
            "W_enc": p.W_enc_rows.T.contiguous(),
            "b_enc": p.b_enc,
            "W_dec": p.W_dec,
            "b_dec": p.b_dec,
            **self.more,
        }
        cfg = {
            "architecture": self.architecture.layout,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(p.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            **_PLAIN,
            **self.architecture.to_layout(),
            "metadata": {
                **metadata,
                "sae_lens_version": _SAELENS_LAYOUT,
                "sae_lens_training_version": None,
                "activation_clip": self.clip,
                _CLIP_LENGTH: None if self.clip is None else self._mean_length(),
                "output_activation": self.output,
            },
        }
        return {
            CFG_FILE: json.dumps(cfg, indent=1, sort_keys=True).encode(),
            WEIGHTS_FILE: save_tensors({k: v.contiguous() for k, v in tensors.items()}),
        }

    @classmethod
    def load(cls, folder: Path) -> SAE:
        """Read a folder written by `files`.

        Raises:
            UserError: a file is missing or unreadable, or says something that we do not know.
        """
        return cls.from_contents(*contents(folder), folder)

    @classmethod
    def from_contents(cls, cfg: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> SAE:
        """The SAE that the contents of `folder` describe; `tensors` by the names of the file.

        Raises:
            UserError: an entry or a tensor is missing, unknown or of the wrong kind.
        """
        try:
            sae = cls._described(cfg, dict(tensors))
            sae.architecture.check(sae.d_sae)
            _check_cfg(cfg, sae)
            return sae
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{folder}: the SAE cannot be read ({type(error).__name__}: {error})"
            ) from error
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    @classmethod
    def _described(cls, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
        layout = cfg["architecture"]
        if layout not in LAYOUTS:
            raise UserError(
                f"architecture {layout!r} in {CFG_FILE} is not one we can read; we know {', '.join(LAYOUTS)}"
            )
        parameters = ops.Parameters(
            W_enc_rows=tensors.pop("W_enc").mT.contiguous(),
            b_enc=tensors.pop("b_enc"),
            W_dec=tensors.pop("W_dec"),
            b_dec=tensors.pop("b_dec"),
        )
        arguments.check_params(parameters)
        if layout in _VECTORS:
            _check_vectors(layout, tensors, parameters)
        output = cfg.get("metadata", {}).get("output_activation", "identity")
        if output not in get_args(Output):
            raise UserError(
                f"metadata.output_activation in {CFG_FILE} is {output!r}; we know "
                f"{', '.join(get_args(Output))}"
            )
        sae = cls(parameters, LAYOUTS[layout].from_layout(cfg), tensors, output)
        sae._check_clip(cfg.get("metadata", {}))
        return sae

    def _mean_length(self) -> float:
        return float(self.parameters.W_dec.norm(dim=1).double().mean())

    def _check_clip(self, metadata: dict[str, Any]) -> None:
        """Another program may have moved the decoder rows' lengths into the features, but not into the clip."""
        then = metadata.get(_CLIP_LENGTH)
        if self.clip is None or then is None:
            return
        now = self._mean_length()
        if abs(now - then) > 1e-3 * then:
            raise UserError(
                f"metadata.activation_clip in {CFG_FILE} was for decoder rows of mean length {then:.4g}, but they "
                f"have {now:.4g}, so features are in other units: take the SAE as it was before, or set the clip "
                "to null if it is not to count"
            )


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of a folder hold, as they are.

    Raises:
        UserError: a file is missing or unreadable.
    """
    try:
        cfg = json.loads((folder / CFG_FILE).read_bytes())
        tensors = load_tensors((folder / WEIGHTS_FILE).read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no SAE: {Path(str(error.filename)).name} is missing"
        ) from error
    except OSError as error:
        raise UserError(f"{folder}: the SAE cannot be read ({error})") from error
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the SAE cannot be read ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(cfg, dict):
        raise UserError(f"{folder}: the SAE cannot be read ({CFG_FILE} holds no object)")
    return cfg, tensors


def _check_cfg(cfg: dict[str, Any], sae: SAE) -> None:
    """No entry that would change the numbers, or that we do not know."""
    found = {"d_in": sae.d_in, "d_sae": sae.d_sae}
    for name, value in found.items():
        if cfg[name] != value:
            raise UserError(f"{name} is {cfg[name]!r} in {CFG_FILE}, but {value} in {WEIGHTS_FILE}")
    wanted = {**_PLAIN, **sae.architecture.to_layout()}
    for name, value in wanted.items():
        if cfg.get(name, value) != value:
            raise UserError(
                f"{name} is {cfg[name]!r} in {CFG_FILE}, and we can read {value!r} alone: fold it into "
                "the weights first"
            )
    known = {"architecture", "dtype", "device", "metadata", *found, *wanted}
    if unknown := sorted(cfg.keys() - known):
        raise UserError(
            f"{unknown[0]} in {CFG_FILE} is not an entry we know, so its effect is unknown"
        )


def _check_vectors(layout: str, tensors: dict[str, Tensor], parameters: ops.Parameters) -> None:
    """The tensors beside the four are those of the layout."""
    like = parameters.b_enc
    wanted = _VECTORS[layout]
    if tensors.keys() != set(wanted):
        raise UserError(
            f"{WEIGHTS_FILE} holds {', '.join(sorted(tensors)) or 'nothing'} beside W_enc, b_enc, W_dec "
            f"and b_dec, but architecture {layout!r} has {', '.join(wanted) or 'nothing'} there"
        )
    for name, tensor in tensors.items():
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise UserError(
                f"{name} in {WEIGHTS_FILE} is {tensor.dtype} {list(tensor.shape)}, but b_enc is "
                f"{like.dtype} {list(like.shape)}"
            )


def activated(y: Tensor, output: Output) -> Tensor:
    """y after the output activation."""
    if output == "sigmoid":
        return torch.sigmoid(y)
    return torch.tanh(y) if output == "tanh" else y
