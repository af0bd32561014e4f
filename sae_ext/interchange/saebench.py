"""SAEBench: an SAE as its evaluations want a custom one.

    from sae_bench.evals.core.main import multiple_evals
    ours = Adapter(SAE.load(folder), model_name="pythia-70m-deduped", hook_layer=4)
    multiple_evals([("ours", ours)], ...)

SAEBench asks for a module with `W_enc`, `W_dec`, `b_enc`, `b_dec`, `cfg`, `device`, `dtype`, dense `encode`,
`decode` and `forward`, and decoder rows of length 1. Rows of another length are scaled: features here are
‖W_dec,j‖ · z_j, and reconstructions are those of the SAE. Written after 0.6.0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from sae_ext.errors import UserError
from sae_ext.interchange.checks import decoder_lengths
from sae_ext.model import SAE, activated
from sae_ext.parameters import Parameters

# How far from 1 a decoder row's length may be where rounding to 16 bits moved it; 1e-5 otherwise.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass
class Cfg:
    """What the evaluations read of an SAE's configuration; they add fields of their own."""

    model_name: str
    """For TransformerLens."""
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    dtype: str
    device: str
    context_size: int | None = None
    hook_head_index: int | None = None
    prepend_bos: bool = True
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields above, ready for JSON."""
        return asdict(self)


class Adapter(nn.Module):
    """See the module. Codes are computed in the SAE's own precision, whatever `dtype` the module has."""

    def __init__(
        self,
        sae: SAE,
        *,
        model_name: str,
        hook_layer: int,
        hook_name: str | None = None,
        context_size: int | None = None,
        prepend_bos: bool = True,
    ) -> None:
        """Wrap an SAE, which stays as it is.

        Args:
            hook_name: where the activations are taken; the residual stream after the layer if absent.

        Raises:
            UserError: the SAE is not one of the activations themselves, or a decoder row is 0.
        """
        super().__init__()
        p = sae.parameters
        row = p.b_dec.new_zeros(1, sae.d_in)
        if sae.architecture.read(row, sae.more) is not row:
            raise UserError(
                "SAEBench wants an SAE that reads and rebuilds the activations themselves, but a "
                f"{type(sae.architecture).__name__} one turns them into others first"
            )
        norm = decoder_lengths(sae, "SAEBench").to(p.W_dec.dtype)
        self._sae, self._norm = sae, norm
        self.W_enc = _frozen(p.W_enc * norm)
        self.b_enc = _frozen(p.b_enc * norm)
        self.W_dec = _frozen(p.W_dec / norm[:, None])
        self.b_dec = _frozen(p.b_dec.clone())
        self.cfg = Cfg(
            model_name, sae.d_in, sae.d_sae, hook_layer,
            hook_name or f"blocks.{hook_layer}.hook_resid_post", sae.architecture.layout,
            dtype=_name(self.dtype), device=str(self.device),
            context_size=context_size, prepend_bos=prepend_bos,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, of codes and of reconstructions."""
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of every module; `cfg` and the SAE inside follow."""
        super().to(*args, **kwargs)
        inner = {name: t.to(self.device) for name, t in self._sae.parameters.tensors().items()}
        more = {name: t.to(self.device) for name, t in self._sae.more.items()}
        self._sae = replace(self._sae, parameters=Parameters(**inner), more=more)
        self._norm = self._norm.to(self.device)
        self.cfg.dtype, self.cfg.device = _name(self.dtype), str(self.device)
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Features ‖W_dec,j‖ · z_j of x [..., d_in], dense [..., d_sae]."""
        rows = x.reshape(-1, x.shape[-1])
        code = self._sae.encode(rows.to(self.device))
        row = torch.repeat_interleave(
            torch.arange(len(rows), device=self.device), code.row_ptr.diff()
        )
        features = torch.zeros(len(rows), self.cfg.d_sae, dtype=self.dtype, device=self.device)
        col = code.col.long()
        features[row, col] = (code.val * self._norm[col]).to(self.dtype)
        return features.reshape(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction [..., d_in] of features [..., d_sae]; gradients pass to the features."""
        x_hat = activated(feature_acts.to(self.dtype) @ self.W_dec + self.b_dec, self._sae.output)
        return self._sae.architecture.write(x_hat, self._sae.more).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [..., d_in]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether every decoder row has length 1, as near as the dtype can have it."""
        off = (self.W_dec.float().norm(dim=1) - 1).abs().max()
        return bool(off <= _TOLERANCE.get(self.dtype, 1e-5))


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
