"""The CUDA kernels on batches of random shape and density, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_C = pytest.importorskip("sae_ext._C", reason="the kernels are not built")

from cases import BUILDS, Case, run_and_compare  # noqa: E402

# Any size, and those at which registers, warps and words are full.
sizes = st.integers(1, 200) | st.sampled_from([4, 8, 32, 33, 63, 64, 65, 128, 192])


@pytest.mark.parametrize("name", BUILDS)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    stored=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    rows=sizes,
    d_in=sizes,
    d_sae=sizes,
    share=st.sampled_from([0.0, 0.02, 0.3, 0.97, 1.0]),
    everywhere=st.booleans(),
    clip=st.sampled_from([2.0**-20, 0.5, 2.0, math.inf]),
    weights=st.sampled_from(["none", "some", "zero"]),
    aligned=st.booleans(),
    threads=st.sampled_from([1, 2, 7, 64]),
    order=st.integers(0, 1000),
)
def test_a_kernel_is_right_on_any_batch(
    name, cuda_kernels, stored, rows, d_in, d_sae, share, everywhere, clip, weights, aligned, threads,
    order,
):  # fmt: skip
    cuda_kernels.begin(order)
    case = Case(
        cuda_kernels, stored, rows, d_in, d_sae, weighted=weights != "none", aligned=aligned,
        share=share, everywhere=(0, d_sae // 2) if everywhere else (), clip=clip,
        zero_weights=weights == "zero",
    )  # fmt: skip
    run_and_compare(name, case, threads)
