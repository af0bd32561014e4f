"""Training steps of other libraries on the GPU, where they can be imported.

As in `benchmarks.step.peers`, each takes its step as its own users do; weights, batches and constants are
ours. SAELens has a free decoder, a penalty weighted by its norms and a clipped gradient; sparsify is
TopK, with k = L0.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import Builder
from benchmarks.step.measure import SAELENS, SETTINGS, TOPK
from benchmarks.step.problem import Start
from sae_ext.step_cuda import Precision


class _SAELens:
    warm_ups = 3

    def __init__(self, start: Start, l0: float, precision: Precision) -> None:
        from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        d_in, d_sae, rows = start.shape
        device = str(start.x.device)
        sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(
                d_in=d_in, d_sae=d_sae, l1_coefficient=SETTINGS.l1, device=device
            )
        )
        with torch.no_grad():
            sae.W_enc.copy_(start.W_enc_rows.T)
            sae.b_enc.copy_(start.b_enc(l0))
            sae.W_dec.copy_(start.W_dec)
            sae.b_dec.copy_(start.b_dec)
        config = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            total_training_samples=10**9, device=device, autocast=precision == "bfloat16",
            lr=SETTINGS.lr, lr_end=SETTINGS.lr, lr_scheduler_name="constant", lr_warm_up_steps=0,
            adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1,
            train_batch_size_samples=rows, dead_feature_window=1000,
            feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self._trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter([]))
        self._seen: Any = None

    def __call__(self, x: Tensor) -> None:
        self._seen = self._trainer.step(x)

    def loss(self) -> float:
        return float(self._seen.loss)


class _Sparsify:
    warm_ups = 3

    def __init__(self, start: Start, l0: float, precision: Precision) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        d_in, d_sae, _ = start.shape
        coder = SparseCoder(
            d_in, SparseCoderConfig(num_latents=d_sae, k=round(l0)), device=start.x.device
        )
        with torch.no_grad():
            coder.encoder.weight.copy_(start.W_enc_rows)
            coder.encoder.bias.copy_(start.b_enc(l0))
            coder.W_dec.copy_(start.W_dec)
            coder.b_dec.copy_(start.b_dec)
        self._coder, self._bf16 = coder, precision == "bfloat16"
        self._optimizer = torch.optim.Adam(coder.parameters(), lr=SETTINGS.lr, fused=True)
        self._fvu: Any = None

    def __call__(self, x: Tensor) -> None:
        self._coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bf16):
            self._fvu = self._coder(x, y=x).fvu
        self._fvu.backward()
        self._coder.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def loss(self) -> float:
        return float(self._fvu)


BUILDERS: Mapping[str, Builder] = {
    name: builder
    for name, module, builder in ((SAELENS, "sae_lens", _SAELens), (TOPK, "sparsify", _Sparsify))
    if find_spec(module) is not None
}
