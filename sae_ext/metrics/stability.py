"""Whether two dictionaries hold the same directions: another seed's, another layer's, the true one.

Two ways of asking, both on signed cosines of decoder rows:
    matched = mean cosine of the one-to-one matching that makes it largest (Hungarian algorithm)
    MMCS    = mean over the features of one of the best cosine in the other (Sharkey et al. 2022);
              not symmetric, so given in both directions

Neither means anything by itself: in few dimensions, or among many features, random directions agree
as well. The same numbers for a second dictionary of random directions stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_ext.errors import UserError

LIMIT = 4096
"""Features of one dictionary that are compared at most; of more, a random sample is."""
MATCHED_ABOVE = (0.9, 0.7)
RECOVERED = 0.9
"""A planted direction counts as found where its match has a cosine above this."""


def agreement(
    W: Tensor,
    other: Tensor,
    *,
    alive: Tensor | None = None,
    other_alive: Tensor | None = None,
    rotated: bool = False,
    limit: int = LIMIT,
    draws: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """How far two dictionaries agree, and how far they would by chance.

    Args:
        W: [m, d] directions, of any length.
        other: [m', d].
        alive: bool [m], the features of W to compare; all when absent.
        other_alive: bool [m'].
        rotated: give a second null beside random directions: `other` turned at random, which keeps
            the angles within it.
        limit: see LIMIT. From more features of `W` a sample is matched with all of `other` and so
            meets less competition than all would; the null is computed alike.
        draws: random dictionaries per null.
        seed: of the samples and the nulls.

    Returns:
        `features` and `other_features` compared, `sampled` and `other_sampled` (features in the
        sample, None where all were taken), `pairs` matched, `matched_cosine`, the shares of pairs
        `matched_above_0.9` and `matched_above_0.7`, `mmcs` (features of W in `other`), `mmcs_other`
        (the reverse); `null_random` and, where asked for, `null_rotated`: the last five as means
        over the `null_draws`.

    Raises:
        UserError: the widths or a mask do not fit, a feature has no direction, or none is left.
    """
    if W.ndim != 2 or other.ndim != 2 or W.shape[1] != other.shape[1]:
        raise UserError(
            f"the dictionaries are {list(W.shape)} and {list(other.shape)}: give decoder rows "
            "[m, d] of one width"
        )
    if limit < 1 or draws < 1:
        raise UserError(f"limit and draws must be at least 1, got {limit} and {draws}")
    generator = torch.Generator().manual_seed(seed)
    one = _directions(W, alive, "the first dictionary")
    two = _directions(other, other_alive, "the second dictionary")
    picked, other_picked = (
        torch.randperm(len(rows), generator=generator)[:limit] for rows in (one, two)
    )

    def null(make: Callable[[], Tensor]) -> dict[str, float]:
        found = [_compare(one, make(), picked, other_picked) for _ in range(draws)]
        return {name: sum(f[name] for f in found) / draws for name in found[0]}

    nulls = {"null_random": null(lambda: _random(two.shape, generator))}
    if rotated:
        nulls["null_rotated"] = null(lambda: two @ _rotation(two.shape[1], generator))
    return {
        "features": len(one),
        "other_features": len(two),
        "sampled": len(picked) if len(picked) < len(one) else None,
        "other_sampled": len(other_picked) if len(other_picked) < len(two) else None,
        "pairs": min(len(picked), len(two)),
        **_compare(one, two, picked, other_picked),
        "null_draws": draws,
        **nulls,
    }


def recovery(
    truth: Tensor, W_dec: Tensor, *, alive: Tensor | None = None, seed: int = 0
) -> dict[str, Any]:
    """How planted directions were found: `agreement` of `truth` [k, d] with W_dec [m, d].

    `recovered` is the share of the true features (of the sample, where one was taken) whose match
    has a cosine above RECOVERED; a true feature left without a match was not found.
    `null_recovered` is the same for random directions. `alive` (bool [m]) masks W_dec.

    Raises:
        UserError: see `agreement`.
    """
    found = agreement(truth, W_dec, other_alive=alive, seed=seed)
    share = found["pairs"] / (found["sampled"] or found["features"])
    name = f"matched_above_{RECOVERED}"
    return {
        "recovered": share * found[name],
        "null_recovered": share * found["null_random"][name],
        **found,
    }


def _compare(one: Tensor, two: Tensor, picked: Tensor, other_picked: Tensor) -> dict[str, float]:
    """The five numbers for unit rows; `picked` and `other_picked` are the samples."""
    from scipy.optimize import linear_sum_assignment

    cosine = one[picked] @ two.T
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    matched = cosine[rows, columns]
    return {
        "matched_cosine": float(matched.mean()),
        **{f"matched_above_{c}": float((matched > c).double().mean()) for c in MATCHED_ABOVE},
        "mmcs": float(cosine.amax(dim=1).mean()),
        "mmcs_other": float((two[other_picked] @ one.T).amax(dim=1).mean()),
    }


def _directions(W: Tensor, alive: Tensor | None, name: str) -> Tensor:
    """Unit rows in float64, on the CPU."""
    W = W.detach().double().cpu()
    index = torch.arange(len(W))
    if alive is not None:
        if alive.shape != index.shape or alive.dtype != torch.bool:
            raise UserError(
                f"the mask of {name} is {alive.dtype} {list(alive.shape)}: give a bool for each of "
                f"its {len(W)} features"
            )
        index = index[alive.cpu()]
    if len(index) == 0:
        raise UserError(f"{name} has no features left to compare: give it another mask")
    length = W[index].norm(dim=1)
    lost = index[~((length > 0) & length.isfinite())]
    if len(lost):
        raise UserError(
            f"row {int(lost[0])} of {name} has no direction (its length is 0 or not finite): leave "
            "such features out with the mask"
        )
    return F.normalize(W[index], dim=1, eps=0.0)


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return F.normalize(normal, dim=1, eps=0.0)


def _rotation(d: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix [d, d] (QR with the signs of R's diagonal undone)."""
    normal = torch.randn(d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return torch.mul(q, r.diagonal().sign())
