"""What is said where a GPU, its driver or the build cannot run the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_ext import native, ops
from sae_ext.errors import UserError
from sae_ext.ops import Step

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")


def gpu(name: str, capability: str) -> dict[str, Any]:
    return {"name": name, "capability": capability, "memory_bytes": 1 << 34}


NO_DEVICE = "no usable CUDA driver or device"
H200, V100 = gpu("NVIDIA H200", "9.0"), gpu("Tesla V100", "7.0")


@pytest.fixture
def runtime(monkeypatch):
    """Sets what the CUDA runtime is said to see."""

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    real, stands_in = native._C, Runtime()

    def see(built: bool, devices: list[dict[str, Any]], driver: int, toolkit: int = 13000) -> None:
        seen = {
            "built": built, "devices": devices, "driver_version": driver,
            "runtime_version": toolkit, "reason": None if devices else NO_DEVICE,
        }  # fmt: skip
        monkeypatch.setattr(stands_in, "cuda", lambda: seen, raising=False)
        monkeypatch.setattr(native, "_C", stands_in)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        native.cuda_missing.cache_clear()

    yield see
    native.cuda_missing.cache_clear()


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ((True, [H200], 13000), None),
        ((True, [H200], 13020), None),
        ((True, [H200, V100], 13000), None),
        ((False, [], 0, 0), "built without CUDA: put nvcc on PATH"),
        ((True, [], 0), NO_DEVICE),
        ((True, [], 12080), r"supports CUDA 12\.8, but the kernels were built with 13\.0: update"),
        ((True, [V100], 13000), r"Tesla V100 has compute capability 7\.0, but .* need 8\.0"),
    ],
)
def test_the_reason_and_the_remedy_are_named(runtime, seen, expected):
    runtime(*seen)
    reason = ops.describe()["cuda"]["reason"]
    if expected is None:
        assert reason is None
        Step("cuda")
        return
    with pytest.raises(UserError, match=expected):
        Step("cuda")
    assert native.cuda_missing() == reason


def test_a_torch_without_cuda_is_named(runtime, monkeypatch):
    runtime(True, [H200], 13000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"torch {torch.__version__} cannot use the GPU" in str(native.cuda_missing())


def test_each_device_is_judged_by_itself(runtime):
    runtime(True, [H200, V100], 13000)
    assert native.cuda_missing(torch.device("cuda", 0)) is None
    assert "V100" in str(native.cuda_missing(torch.device("cuda", 1)))
