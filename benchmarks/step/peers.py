"""The child process with the peers' training steps: see `benchmarks.step.process`.

Runs in `.venv-peers` (`make peers`), which needs no Sparsemill. Each peer takes its step as its own
users do; only weights, batches and constants are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.step.problem import Settings, Start
from benchmarks.step.process import Builder, serve


class _SAELens:
    """SAELens 6: free decoder, L1 weighted by its norms, gradient clipped to norm 1."""

    def __init__(self, start: Start, l0: float, settings: Settings) -> None:
        from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        d_in, d_sae, rows = start.shape
        self._sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=settings.l1)
        )
        with torch.no_grad():
            self._sae.W_enc.copy_(start.W_enc_rows.T)
            self._sae.b_enc.copy_(start.b_enc(l0))
            self._sae.W_dec.copy_(start.W_dec)
            self._sae.b_dec.copy_(start.b_dec)
        config = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            total_training_samples=10**9, device="cpu", autocast=False, lr=settings.lr,
            lr_end=settings.lr, lr_scheduler_name="constant", lr_warm_up_steps=0,
            adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1,
            train_batch_size_samples=rows, dead_feature_window=1000,
            feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self._trainer = SAETrainer(cfg=config, sae=self._sae, data_provider=iter([]))
        _make_moments(self._trainer.optimizer)

    def __call__(self, x: Tensor) -> tuple[float, None]:
        return self._trainer.step(x).loss.item(), None

    def parameters(self) -> dict[str, Tensor]:
        sae = self._sae
        weights = {"W_enc_rows": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec}
        return {**weights, "b_dec": sae.b_dec}


class _DictionaryLearning:
    """dictionary_learning's StandardTrainer: unit-norm decoder, projected gradient."""

    def __init__(self, start: Start, l0: float, settings: Settings) -> None:
        from dictionary_learning.trainers.standard import StandardTrainer

        class Remembering(StandardTrainer):
            """Keeps the loss, which `update` throws away."""

            def loss(self, *args: object, **kwargs: object) -> Tensor:
                self.last_loss = super().loss(*args, **kwargs)
                return self.last_loss

        d_in, d_sae, _ = start.shape
        self._trainer = Remembering(
            steps=10**6, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="",
            lr=settings.lr, l1_penalty=settings.l1, warmup_steps=1, sparsity_warmup_steps=None,
            resample_steps=None, device="cpu",
        )  # fmt: skip
        ae = self._trainer.ae
        with torch.no_grad():
            ae.encoder.weight.copy_(start.W_enc_rows)
            ae.encoder.bias.copy_(start.b_enc(l0))
            ae.decoder.weight.copy_(start.W_dec.T)
            ae.bias.copy_(start.b_dec)
        _make_moments(self._trainer.optimizer)

    def __call__(self, x: Tensor) -> tuple[float, None]:
        self._trainer.update(1, x)
        return self._trainer.last_loss.item(), None

    def parameters(self) -> dict[str, Tensor]:
        ae = self._trainer.ae
        weights = {"W_enc_rows": ae.encoder.weight, "b_enc": ae.encoder.bias}
        return {**weights, "W_dec": ae.decoder.weight.T, "b_dec": ae.bias}


class _Sparsify:
    """sparsify's SparseCoder, TopK with k = L0; its loss is the fraction of variance unexplained."""

    def __init__(self, start: Start, l0: float, settings: Settings) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        d_in, d_sae, _ = start.shape
        self._coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=round(l0)))
        with torch.no_grad():
            self._coder.encoder.weight.copy_(start.W_enc_rows)
            self._coder.encoder.bias.copy_(start.b_enc(l0))
            self._coder.W_dec.copy_(start.W_dec)
            self._coder.b_dec.copy_(start.b_dec)
        self._optimizer = torch.optim.Adam(
            self._coder.parameters(), lr=settings.lr, eps=settings.eps
        )
        _make_moments(self._optimizer)

    def __call__(self, x: Tensor) -> tuple[float, None]:
        self._coder.set_decoder_norm_to_unit_norm()
        out = self._coder(x, y=x)
        out.fvu.backward()
        self._coder.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return out.fvu.item(), None

    def parameters(self) -> dict[str, Tensor]:
        coder = self._coder
        weights = {"W_enc_rows": coder.encoder.weight, "b_enc": coder.encoder.bias}
        return {**weights, "W_dec": coder.W_dec, "b_dec": coder.b_dec}


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam its moments before the first step, which would otherwise seem to need them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


BUILDERS: dict[str, Builder] = {
    "SAELens": _SAELens,
    "dictionary_learning": _DictionaryLearning,
    "sparsify TopK": _Sparsify,
}

if __name__ == "__main__":
    serve(BUILDERS)
