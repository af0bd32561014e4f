"""Types of the compiled module; csrc/bind.cpp implements it and csrc/saek.h is its contract.

Pointers are integers from Tensor.data_ptr(); 0 stands for NULL where that is allowed. Functions that
return an int return a code of saek.h; anything but the codes named here is raised as ValueError, what the
CUDA runtime refuses as RuntimeError. Tuples follow the C structs:

    exec      device, dtype, threads, stream, skip
    code      row_ptr, col, val, rows
    out       row_ptr, col, val, capacity, counters
    entries   feature_ptr, row, z, dz, long_lists, slots
    gradient  entries, grad, xc, dW_enc, dW_dec, grad_b_enc, pull, W_dec, long_rows, d_in, d_sae
    adam      numbers, grad_scale
    moments   value, m, v
"""

from typing import Any

_Exec = tuple[int, int, int, int, int]
_Code = tuple[int, int, int, int]
_Out = tuple[int, int, int, int, int]
_Entries = tuple[int, ...]
_Gradient = tuple[_Entries, int, int, int, int, int, int, int, int, int, int]
_Adam = tuple[int, int]
_Moments = tuple[int, int, int]

FLOAT32: int
FLOAT64: int
BFLOAT16: int
CPU: int
CUDA: int
OK: int
OVERFLOW: int
UNSUPPORTED: int
TOO_DENSE: int
TOO_SHORT: int
NOT_FINITE: int
B_DEC_SHARES: int
LONG_LIST: int
SHARED_ROW: int

def isa() -> str: ...
def has_openmp() -> bool: ...
def cuda() -> dict[str, Any]: ...
def screen_scratch(*, rows: int, d_in: int, d_sae: int, threads: int) -> int: ...
def compact(
    *,
    exec: _Exec,
    pre: int,
    b_enc: int,
    clip: float,
    rows: int,
    d_sae: int,
    mask: int,
    counts: int,
    out: _Out,
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
    counts: int,
    out: _Out,
) -> int: ...
def decode(*, exec: _Exec, code: _Code, matrix: int, bias: int, d_in: int, out: int) -> int: ...
def residual(
    *,
    exec: _Exec,
    code: _Code,
    W_dec: int,
    x: int,
    b_dec: int,
    recon_weight: int,
    l1_weight: int,
    feature_weight: int,
    recon_scale: float,
    l1_scale: int,
    d_in: int,
    shared_bytes: int,
    halt: int,
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
def feature_norms(
    *, exec: _Exec, gradient: _Gradient, dW_enc: int, dW_dec: int, out: int
) -> int: ...
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
    W_enc_copy: int,
    W_dec_copy: int,
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
    scratch: int,
) -> int: ...
def dense_residual(
    *,
    exec: _Exec,
    grad: int,
    x: int,
    b_dec: int,
    recon_weight: int,
    recon_scale: float,
    rows: int,
    d_in: int,
    halt: int,
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
    l1_scale: int,
    rows: int,
    d_sae: int,
    grad_b_enc: int,
    scratch: int,
) -> int: ...
