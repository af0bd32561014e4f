"""Types of the compiled module; csrc/bind.cpp implements it and csrc/saek.h is its contract.

Pointers are integers from Tensor.data_ptr(); 0 stands for NULL where that is allowed. Functions that
return an int return a code of saek.h; anything but the codes named here is raised as ValueError.
"""

from typing import Any

_Exec = tuple[int, int]
_Code = tuple[int, int, int, int]
_Out = tuple[int, int, int, int, int]
_Entries = tuple[int, ...]
_Gradient = tuple[Any, ...]
_Adam = tuple[float, float, float, float, float, int, int]
_Moments = tuple[int, int, int]

FLOAT32: int
FLOAT64: int
OK: int
OVERFLOW: int
UNSUPPORTED: int
TOO_DENSE: int
B_DEC_SHARES: int

def isa() -> str: ...
def has_openmp() -> bool: ...
def cuda() -> dict[str, Any]: ...
def screen_scratch(*, rows: int, d_in: int, d_sae: int, threads: int) -> int: ...
def compact(
    *, exec: _Exec, pre: int, b_enc: int, clip: float, rows: int, d_sae: int, mask: int, out: _Out
) -> int: ...
def screen(
    *,
    exec: _Exec,
    xc: int,
    W_enc: int,
    b_enc: int,
    clip: float,
    rows: int,
    d_in: int,
    d_sae: int,
    limit: float,
    scratch: int,
    list_col: int,
    list_val: int,
    out: _Out,
) -> int: ...
def gather(
    *,
    exec: _Exec,
    support_ptr: int,
    support_col: int,
    xc: int,
    W_enc: int,
    b_enc: int,
    clip: float,
    rows: int,
    d_in: int,
    support_length: int,
    scratch: int,
    out: _Out,
) -> int: ...
def decode(*, exec: _Exec, code: _Code, matrix: int, bias: int, d_in: int, out: int) -> int: ...
def residual(
    *,
    exec: _Exec,
    code: _Code,
    W_dec: int,
    xc: int,
    recon_weight: int,
    l1_weight: int,
    feature_weight: int,
    recon_scale: float,
    l1_scale: float,
    d_in: int,
    row_sums: int,
    grad: int,
    dz: int,
    sums: int,
) -> int: ...
def dz(
    *,
    exec: _Exec,
    code: _Code,
    W_dec: int,
    grad: int,
    grad_l1: int,
    feature_weight: int,
    grad_activity: int,
    grad_val: int,
    d_in: int,
    dz: int,
) -> int: ...
def transpose(
    *,
    exec: _Exec,
    code: _Code,
    dz: int,
    row_weight: int,
    d_sae: int,
    counts: int,
    entries: _Entries,
    grad_b_enc: int,
    z_sum: int,
) -> int: ...
def b_dec_gradient(
    *,
    exec: _Exec,
    grad: int,
    grad_b_enc: int,
    W_enc: int,
    rows: int,
    d_in: int,
    d_sae: int,
    scratch: int,
    out: int,
) -> int: ...
def feature_gradients(*, exec: _Exec, gradient: _Gradient, dW_enc: int, dW_dec: int) -> int: ...
def feature_norms(*, exec: _Exec, gradient: _Gradient, scratch: int, out: int) -> int: ...
def update_features(
    *,
    exec: _Exec,
    gradient: _Gradient,
    adam: _Adam,
    unit_norm: bool,
    scratch: int,
    W_enc: _Moments,
    b_enc: _Moments,
    W_dec: _Moments,
) -> int: ...
def update(*, exec: _Exec, gradient: int, n: int, adam: _Adam, parameter: _Moments) -> int: ...
def row_norms(*, exec: _Exec, matrix: int, rows: int, d_in: int, out: int) -> int: ...
def dense_activate(
    *,
    exec: _Exec,
    pre: int,
    b_enc: int,
    clip: float,
    row_weight: int,
    rows: int,
    d_sae: int,
    passes: int,
    fired: int,
    saturated: int,
    z_sum: int,
) -> int: ...
def dense_residual(
    *,
    exec: _Exec,
    grad: int,
    xc: int,
    recon_weight: int,
    recon_scale: float,
    rows: int,
    d_in: int,
    row_sums: int,
    sums: int,
) -> int: ...
def dense_mask(
    *,
    exec: _Exec,
    dz: int,
    passes: int,
    l1_weight: int,
    feature_weight: int,
    l1_scale: float,
    rows: int,
    d_sae: int,
    grad_b_enc: int,
) -> int: ...
