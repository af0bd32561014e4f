"""A projection in front of an autoencoder that was trained elsewhere: rows e are read as x = P(e).

    x = P(e) = e Wᵀ + c        x̂ = z W_dec + b_dec        all of it learns

What x̂ should be is `target`: P(e) held fixed ("stopgrad"); e itself, through a learned linear read-out of x̂
("embedding"); or P(e) with a gradient ("projected"), where it pays to make P(e) small, so that all rows
collapse to one point. That last one is there to show it, and to see that what looks for it finds it.

The pre-trained autoencoder is taken on a scale where its decoder rows have length 1, as in training:

    space     x' = s x, with the scale s in the folder's training.json; without one the inverse of the decoder
              rows' mean length, which is the same for a decoder of unit length
    features  z' = n z, with ‖s W_dec,j‖ = n_j; W_enc, b_enc, thresholds and clip go with it

The projection begins random, with orthonormal rows or columns, so that the rows' centre meets b_dec and
E‖P(e)‖² is about the width, as it was where the autoencoder was trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sae_ext import ops
from sae_ext.architectures.base import FOUR, Architecture, Forward, Now, Weights, four
from sae_ext.architectures.jumprelu import Thresholds
from sae_ext.architectures.relu import ReLU
from sae_ext.architectures.topk import TopK
from sae_ext.errors import UserError
from sae_ext.fields import STRICT, require
from sae_ext.ops import Parameters, SparseCode, Support

Target = Literal["stopgrad", "embedding", "projected"]

_W, _BIAS = "projection.weight", "projection.bias"
_READOUT, _READOUT_BIAS = "projection.readout", "projection.readout_bias"
_OWN = (_W, _BIAS, _READOUT, _READOUT_BIAS)
_THRESHOLD = "threshold"
_SAME_LENGTH = 1e-4  # what rounding leaves between rows that should be equally long


@dataclass(frozen=True, kw_only=True)
class Projected(Architecture):
    """A projection and its autoencoder after training."""

    __pydantic_config__ = STRICT
    own_target: ClassVar[bool] = True
    layout: ClassVar[str] = "sparsemill_projection"

    kind: Literal["projected"] = "projected"
    inner: ReLU | TopK | Thresholds
    """What the autoencoder is."""
    reads_out: bool = False
    """Whether it reconstructs e rather than P(e)."""

    @property
    def clip(self) -> float | None:
        """That of the autoencoder."""
        return self.inner.clip

    def check(self, d_sae: int) -> None:
        """As the autoencoder."""
        self.inner.check(d_sae)

    def encode(self, x: Tensor, params: Parameters, more: Mapping[str, Tensor]) -> SparseCode:
        """The autoencoder's code of P(e)."""
        return self.inner.encode(x, params, more)

    def read(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """P(e)."""
        return projected(x, tensors)

    def target(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """P(e), or e where it is read out."""
        return x if self.reads_out else projected(x, tensors)

    def write(self, x_hat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x̂, or e as it is read out of x̂."""
        return read_out(x_hat, tensors) if self.reads_out else x_hat

    def d_in(self, params: Parameters, tensors: Mapping[str, Tensor]) -> int:
        """Width of e."""
        return int(tensors[_W].shape[1])

    def d_out(self, params: Parameters, tensors: Mapping[str, Tensor]) -> int:
        """Width of e where it is read out."""
        return int(tensors[_READOUT].shape[0]) if self.reads_out else super().d_out(params, tensors)

    def to_layout(self) -> dict[str, Any]:
        """What the autoencoder is."""
        inner = {"architecture": self.inner.layout, **self.inner.to_layout()}
        return {"inner": inner, "reads_out": self.reads_out}

    @classmethod
    def from_layout(cls, cfg: Mapping[str, Any]) -> Projected:
        """See `to_layout`."""
        layouts: dict[str, Any] = {kind.layout: kind for kind in (ReLU, TopK, Thresholds)}
        kind = layouts[cfg["inner"]["architecture"]]
        inner = kind.from_layout({"metadata": cfg.get("metadata", {}), **cfg["inner"]})
        return cls(inner=inner, reads_out=cfg["reads_out"])


@dataclass(frozen=True, kw_only=True)
class Projection(Architecture):
    """See the module. Its `d_sae` and architecture are those of the folder; `sae.b_dec` says what centre of the
    rows begins at the autoencoder's b_dec."""

    __pydantic_config__ = STRICT
    selects: ClassVar[bool] = False
    own_target: ClassVar[bool] = True

    kind: Literal["projection"] = "projection"
    pretrained: str
    """Folder of the autoencoder, as `SAE.load` reads it, from where the command is run; for a cluster give an
    absolute path that all its machines see. What it holds is part of the SAE's key."""
    target: Target = "stopgrad"  # type: ignore[assignment]  # the method is asked after training alone
    """What x̂ should be, see the module."""

    @property
    def sparse_alone(self) -> bool:  # type: ignore[override]
        """As the autoencoder."""
        return self._pretrained.inner.sparse_alone

    @property
    def ranks(self) -> bool:  # type: ignore[override]
        """As the autoencoder."""
        return self._pretrained.inner.ranks

    def begins_from(self) -> str:
        """A hash of the folder's files that are read."""
        digest = hashlib.sha256()
        for name in ("cfg.json", "sae_weights.safetensors", "training.json"):
            path = Path(self.pretrained, name)
            digest.update(path.read_bytes() if path.exists() else b"")
        _ = self._pretrained  # says what is wrong with it
        return digest.hexdigest()[:16]

    @property
    def clip(self) -> float | None:
        """That of the folder, for decoder rows of length 1."""
        return self._pretrained.inner.clip

    def initial(
        self, d_in: int, d_sae: int, b_dec: Tensor, classes: Mapping[str, list[str]], seed: int
    ) -> Weights:
        """The folder's four, and P: W [d, d_in] and c [d], d being the autoencoder's width; for a target
        "embedding" the read-out [d_in, d] and [d_in] that undoes P as far as it can be.

        Raises:
            UserError: the folder has another number of features, or cannot be trained on.
        """
        found = self._pretrained
        params = found.params
        width = params.W_dec.shape[1]
        require(
            len(params.b_enc) == d_sae,
            f"d_sae is {d_sae}, but the SAE in pretrained ({self.pretrained}) has {len(params.b_enc)} features: "
            f"set d_sae to {len(params.b_enc)}",
        )
        centre = b_dec.float()
        # E‖e‖² is about d_in where rows are scaled, of which ‖centre‖² is their mean's; likewise for x.
        spread = _left(d_in, centre)
        wanted = _left(width, params.b_dec)
        kept = min(1.0, width / d_in)
        W = _orthonormal(width, d_in, seed) * math.sqrt(wanted / (kept * spread))
        weights = {name: getattr(params, name).clone() for name in FOUR}
        weights |= {_W: W, _BIAS: params.b_dec - W @ centre}
        if self.target == "embedding":
            back = torch.linalg.pinv(W)
            weights |= {_READOUT: back, _READOUT_BIAS: centre - back @ params.b_dec}
        return weights

    def counted(self) -> dict[str, Tensor]:
        """Thresholds, which do not learn."""
        threshold = self._pretrained.threshold
        return {} if threshold is None else {_THRESHOLD: threshold.clone()}

    def forward(self, x: Tensor, weights: Weights, now: Now, *, price: Tensor | None) -> Forward:
        """The autoencoder on P(e), beside what it should give."""
        params, inner = four(weights), self._pretrained.inner
        read = projected(x, weights)
        support = None
        if not isinstance(inner, ReLU):
            with torch.no_grad():
                code = inner.encode(read, params, now.counters)
            support = Support(code.row_ptr, code.col)
        out = ops.autoencode(read, params, clip=inner.clip, feature_weight=price, support=support)
        if self.target == "embedding":
            return Forward(read_out(out.x_hat, weights), out.code, out.l1, target=x)
        target = read if self.target == "projected" else read.detach()
        return Forward(out.x_hat, out.code, out.l1, target=target)

    def folded(self, weights: Weights, scale: float) -> Weights:
        """P reads raw rows and the read-out gives them; what lies between stays."""
        folded = {name: t.clone() for name, t in weights.items()}
        folded[_W] = weights[_W] * scale
        for name in (_READOUT, _READOUT_BIAS):
            if name in weights:
                folded[name] = weights[name] / scale
        return folded

    def final(self, weights: Weights, counters: Mapping[str, Tensor]) -> tuple[Projected, Weights]:
        """P, the read-out where there is one, and thresholds."""
        more = {name: weights[name] for name in _OWN if name in weights}
        if _THRESHOLD in counters:
            more[_THRESHOLD] = counters[_THRESHOLD]
        inner = self._pretrained.inner
        return Projected(inner=inner, reads_out=self.target == "embedding"), more

    def read(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """P(e)."""
        return projected(x, tensors)

    def d_out(self, params: Parameters, tensors: Mapping[str, Tensor]) -> int:
        """Width of e where it is read out."""
        if self.target == "embedding":
            return int(tensors[_READOUT].shape[0])
        return super().d_out(params, tensors)

    @functools.cached_property
    def _pretrained(self) -> _Pretrained:
        """Read once: in a run it stays what it was, whatever becomes of the folder meanwhile."""
        folder = Path(self.pretrained)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return _load(self.pretrained, tuple((f.name, f.stat().st_mtime_ns) for f in files))


def projected(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """P(e) [B, d] of rows e [B, d_in]."""
    return torch.addmm(tensors[_BIAS], x.to(tensors[_W].dtype), tensors[_W].T)


def read_out(x_hat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """What reconstructions [B, d] of P(e) say of e [B, d_in]."""
    return torch.addmm(tensors[_READOUT_BIAS], x_hat, tensors[_READOUT].T)


class _Pretrained(NamedTuple):
    inner: ReLU | TopK | Thresholds
    params: Parameters
    threshold: Tensor | None


@functools.lru_cache(maxsize=4)
def _load(folder: str, written: tuple[tuple[str, int], ...]) -> _Pretrained:
    """The autoencoder of a folder on the scale that the module tells of."""
    from sae_ext.model import SAE  # which knows all architectures

    sae = SAE.load(Path(folder))
    inner, where = sae.architecture, f"pretrained: the SAE in {folder}"
    if not isinstance(inner, ReLU | TopK | Thresholds):
        raise UserError(
            f"{where} is a {type(inner).__name__}, which cannot be trained on: give one that is a ReLU, TopK "
            "or JumpReLU"
        )
    require(
        sae.output == "identity",
        f"{where} ends in a {sae.output}, which has no scale: give one without an output activation",
    )
    given = Parameters(**{name: t.float() for name, t in sae.parameters.tensors().items()})
    length = given.W_dec.norm(dim=1)
    require(
        bool((length > 0).all()),
        f"{where} has features whose decoder rows are 0: leave them out, or give another one",
    )
    scale = _scale_of(Path(folder)) or 1 / float(length.mean())
    n = length * scale
    alike = float(n.max() - n.min()) <= _SAME_LENGTH * float(n.mean())
    bound = "a clip" if inner.clip is not None else "a TopK" if isinstance(inner, TopK) else None
    require(
        alike or bound is None,
        f"{where} has {bound} and decoder rows of different lengths, so that rows of length 1 would make it "
        "another one: give one trained with decoder: unit",
    )
    if inner.clip is not None:
        inner = ReLU(clip=inner.clip * float(n.mean()))
    params = Parameters(
        W_enc_rows=given.W_enc_rows * length[:, None],
        b_enc=given.b_enc * n,
        W_dec=given.W_dec / length[:, None],
        b_dec=given.b_dec * scale,
    )
    threshold = sae.more.get(_THRESHOLD)
    return _Pretrained(inner, params, None if threshold is None else threshold.float() * n)


def _scale_of(folder: Path) -> float | None:
    """What activations were multiplied by where the SAE was trained; None where nothing says so."""
    path = folder / "training.json"
    if not path.exists():
        return None
    try:
        found = dict(json.loads(path.read_bytes())).get("scale")
        if found is None:  # of an SAE that was taken in from elsewhere
            return None
        scale = float(found)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"pretrained: {path} has no number under scale: correct it, or remove the file"
        ) from error
    require(scale > 0, f"pretrained: scale in {path} must be positive, got {scale}: correct it")
    return scale


def _left(width: int, centre: Tensor) -> float:
    """E‖x - centre‖² where E‖x‖² is about the width; a learned centre may be longer than rows are."""
    return max(width - float(centre.square().sum()), 0.05 * width)


def _orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Orthonormal rows, or columns where there are fewer of them."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensor = torch.nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)
    return found
