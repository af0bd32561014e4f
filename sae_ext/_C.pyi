"""Types of the compiled module; csrc/bind.cpp implements it and csrc/saek.h is its contract.

Pointers are integers from Tensor.data_ptr(); 0 stands for NULL where that is allowed.
"""

from typing import Any

_Code = tuple[int, int, int, int]
_Adam = tuple[float, float, float, float, int]
_Moments = tuple[int, int, int]

FLOAT32: int
FLOAT64: int

def isa() -> str: ...
def has_openmp() -> bool: ...
def cuda() -> dict[str, Any]: ...
def compact(
    *,
    dtype: int,
    pre: int,
    b_enc: int,
    clip: float,
    rows: int,
    d_sae: int,
    capacity: int,
    threads: int,
    mask: int,
    row_ptr: int,
    col: int,
    val: int,
) -> tuple[int, int]: ...
def decode(
    *, dtype: int, code: _Code, W_dec: int, b_dec: int, d_in: int, threads: int, out: int
) -> None: ...
def residual(
    *,
    dtype: int,
    code: _Code,
    W_dec: int,
    xc: int,
    recon_weight: int,
    l1_weight: int,
    recon_scale: float,
    l1_scale: float,
    d_in: int,
    threads: int,
    row_partials: int,
    grad: int,
    dz: int,
) -> tuple[float, float]: ...
def transpose(
    *,
    dtype: int,
    code: _Code,
    dz: int,
    d_sae: int,
    threads: int,
    counts: int,
    feature_ptr: int,
    row: int,
    z: int,
    dz_by_feature: int,
    grad_b_enc: int,
) -> None: ...
def update_b_dec(
    *,
    dtype: int,
    grad: int,
    grad_b_enc: int,
    W_enc: int,
    rows: int,
    d_in: int,
    d_sae: int,
    threads: int,
    adam: _Adam,
    b_dec: _Moments,
) -> None: ...
def update_features(
    *,
    dtype: int,
    feature_ptr: int,
    row: int,
    z: int,
    dz: int,
    d_sae: int,
    grad: int,
    xc: int,
    grad_b_enc: int,
    d_in: int,
    threads: int,
    adam: _Adam,
    scratch: int,
    W_enc: _Moments,
    b_enc: _Moments,
    W_dec: _Moments,
) -> None: ...
