"""The sparse autoencoder as a user holds it, and the folder it is kept in.

    pre = (x - b_dec) W_enc + b_enc      z = min(relu(pre), clip)      x̂ = z W_dec + b_dec

The folder is one that SAELens 6 loads as it is: `cfg.json` and `sae_weights.safetensors` with
`W_enc [d_in, d_sae]`, `b_enc`, `W_dec [d_sae, d_in]`, `b_dec`. SAELens knows no upper clip and reads
such an SAE as a plain ReLU one, which is exact only where nothing was clipped: the clip and the
measured rate of clipped activations are recorded in the metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_ext import ops
from sae_ext.errors import UserError

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# The oldest file layout version under which SAELens reads the metadata instead of migrating it.
_SAELENS_LAYOUT = "6.0.0"
_PLAIN = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
"""The settings of SAELens under which its numbers are those of the equations above."""


@dataclass
class SAE:
    """A sparse autoencoder for raw activations (any scaling used in training is folded in)."""

    parameters: ops.Parameters
    clip: float | None = None

    FILES: ClassVar[tuple[str, str]] = (CFG_FILE, WEIGHTS_FILE)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return int(self.parameters.W_dec.shape[1])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.parameters.W_dec.shape[0])

    def encode(self, x: Tensor) -> ops.SparseCode:
        """The sparse code of rows x [B, d_in].

        Raises:
            UserError: x has another width than the SAE.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UserError(
                f"activations are {list(x.shape)}, but the SAE reads rows of width d_in = {self.d_in}"
            )
        return ops.encode(x, self.parameters, self.clip)

    def decode(self, code: ops.SparseCode) -> Tensor:
        """Reconstruction [B, d_in] of a sparse code."""
        return ops.decode(code, self.parameters)

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
        }
        cfg = {
            "architecture": "standard",
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(p.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            **_PLAIN,
            "metadata": {
                "sae_lens_version": _SAELENS_LAYOUT,
                "sae_lens_training_version": None,
                "activation_clip": self.clip,
                **metadata,
            },
        }
        return {
            CFG_FILE: json.dumps(cfg, indent=1, sort_keys=True).encode(),
            WEIGHTS_FILE: save_tensors({k: v.contiguous() for k, v in tensors.items()}),
        }

    @classmethod
    def load(cls, folder: Path) -> SAE:
        """Read a folder written by `files`, or by SAELens for its `standard` architecture.

        Raises:
            UserError: a file is missing or unreadable, or the architecture is another one, or the
                activations are to be changed on their way in.
        """
        try:
            cfg = json.loads((folder / CFG_FILE).read_bytes())
            tensors = load_tensors((folder / WEIGHTS_FILE).read_bytes())
            architecture = cfg.get("architecture")
            if architecture != "standard":
                raise UserError(f"{folder}: architecture {architecture!r} is not one we can read")
            for name, plain in _PLAIN.items():
                if cfg.get(name, plain) != plain:
                    raise UserError(
                        f"{folder}: {name} is {cfg[name]!r} in {CFG_FILE}, which is not one we can "
                        f"read: fold it into the weights and set it to {plain!r}"
                    )
            parameters = ops.Parameters(
                W_enc_rows=tensors["W_enc"].T.contiguous(),
                b_enc=tensors["b_enc"],
                W_dec=tensors["W_dec"],
                b_dec=tensors["b_dec"],
            )
            return cls(parameters, cfg.get("metadata", {}).get("activation_clip"))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} holds no SAE: {Path(str(error.filename)).name} is missing"
            ) from error
        except (ValueError, SafetensorError, KeyError, AttributeError) as error:
            raise UserError(
                f"{folder}: the SAE cannot be read ({type(error).__name__}: {error})"
            ) from error


def initial_parameters(d_in: int, d_sae: int, b_dec: Tensor, seed: int) -> ops.Parameters:
    """Random unit-norm decoder rows, the encoder its transpose, b_enc zero, b_dec as given."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return ops.Parameters(
        W_enc_rows=W_dec.clone(), b_enc=torch.zeros(d_sae), W_dec=W_dec, b_dec=b_dec.float().clone()
    )


def fold_scale(parameters: ops.Parameters, scale: float) -> ops.Parameters:
    """Parameters for raw activations x from ones trained on scale·x; codes keep the trained units.

    W_enc·s reads raw rows, W_dec/s and b_dec/s write them; b_enc and the clip stay.
    """
    return ops.Parameters(
        W_enc_rows=parameters.W_enc_rows * scale,
        b_enc=parameters.b_enc.clone(),
        W_dec=parameters.W_dec / scale,
        b_dec=parameters.b_dec / scale,
    )
