"""Every kernel at small odd sizes, for a run under compute-sanitizer: both ways of a step, in each
precision and with each of its options, and the differentiable operator.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.small

Computes and compares nothing; the sanitizer watches. Ends with the line "small: done".
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.contenders import own_step
from benchmarks.gpu.sizes import PRECISIONS, made_up, weights
from benchmarks.step.problem import Shape
from sae_ext import ops
from sae_ext.ops import Parameters, Support

SHAPES = (
    Shape(100, 257, 37),
    Shape(13, 70, 5),
    Shape(24, 40, 600),  # features with so many entries that several blocks share them
    Shape(12300, 5, 3),  # rows that shared memory cannot hold
)


def main() -> None:
    """Run everything once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape in SHAPES:
        start = made_up(shape, device)
        params, _ = weights(start, 0.9 * shape.d_sae)
        x = start.x[0]
        code = ops.encode(x, params, clip=1.0)
        ops.decode(code, params)
        positive = torch.rand(shape.rows, device=device)
        options: tuple[dict[str, Any], ...] = (
            {"clip": 1.0},
            {"decoder_norm": "free", "max_grad_norm": 0.1},
            {"recon_weight": positive, "l1_weight": positive, "train_b_dec": False},
            {"feature_weight": torch.rand(shape.d_sae, device=device)},
            {"support": Support(code.row_ptr, code.col)},
        )
        for precision in PRECISIONS:
            for way in ("entries", "dense"):
                step = own_step(device, precision)
                # tf32 has the kernels of float32.
                for option in options if precision != "tf32" else options[:1]:
                    step.restore({"sparse": way == "entries", "densities": []})
                    step(*weights(start, 0.9 * shape.d_sae), x, l1=1.0, lr=1e-3, **option)
                    step.wait()
        _differentiate(params, x.clone().requires_grad_())
    print("small: done")


def _differentiate(params: Parameters, x: torch.Tensor) -> None:
    for tensor in params.tensors().values():
        tensor.requires_grad_()
    out = ops.autoencode(x, params, clip=1.0, feature_weight=torch.rand_like(params.b_enc))
    (out.x_hat.square().sum() + out.l1.sum() + out.activity.sum() + out.code.val.sum()).backward()


if __name__ == "__main__":
    main()
