"""Our training step against the peers' own trainers: 20 steps, the same weights after each.

They need more than the usual environment holds: `make peers`, then
`.venv-peers/bin/python -m pytest tests/external/test_step_parity.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from sae_ext import native
from sae_ext.ops import AdamState, Parameters, Step, StepResult

D_IN, D_SAE, ROWS, STEPS = 24, 96, 128, 20
L1, LR = 2.0, 1e-3
L1_WARM_UP, LR_WARM_UP = 12, 6

compiled = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")
backends = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=compiled), "reference"])
# Relative, in norm. float32 rounds differently in differently ordered sums, and Adam keeps it.
precisions = pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)


class Trainer(Protocol):
    """A peer's trainer."""

    def step(self, i: int, x: Tensor) -> float:
        """Take step i; returns the loss before it."""

    def weights(self) -> dict[str, Tensor]:
        """Its tensors by our names."""


def made_up(dtype: torch.dtype, *, unit: bool) -> Parameters:
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    W_dec = normal(D_SAE, D_IN)
    length = 1.0 if unit else torch.linspace(0.1, 1.5, D_SAE, dtype=torch.float64)[:, None]
    tensors = (
        normal(D_SAE, D_IN) / D_IN**0.5,
        0.2 * normal(D_SAE) - 0.5,
        length * W_dec / W_dec.norm(dim=1, keepdim=True),
        0.1 * normal(D_IN),
    )
    return Parameters(*(t.to(dtype) for t in tensors))


def batch(i: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(100 + i)
    return torch.randn(ROWS, D_IN, generator=g, dtype=torch.float64).to(dtype)


@torch.no_grad()
def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.dist(found, expected) / expected.norm())


def l1_at(i: int) -> float:
    """Both peers' warm-up: from 0 at the first step."""
    return L1 * min(i / L1_WARM_UP, 1)


def run_both(
    theirs: Trainer, ours: Parameters, backend: str, lr: list[float], limit: float, **semantics: Any
) -> list[StepResult]:
    """Take all steps side by side, comparing losses and weights after each; returns what ours saw."""
    step, adam = Step(backend), AdamState.zeros(ours)
    seen = []
    for i in range(STEPS):
        x = batch(i, ours.W_dec.dtype)
        loss = theirs.step(i, x)
        seen.append(step(ours, adam, x, l1=l1_at(i), lr=lr[i], **semantics))
        assert seen[-1].loss == pytest.approx(loss, rel=limit)
        for name, expected in theirs.weights().items():
            error = relative_error(ours.tensors()[name], expected)
            assert error < limit, f"{name} after step {i}"
    return seen


class SAELensTrainer:
    def __init__(self, start: Parameters) -> None:
        sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed: make peers")
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        dtype = str(start.W_dec.dtype).removeprefix("torch.")
        self.sae = sae_lens.StandardTrainingSAE(
            sae_lens.StandardTrainingSAEConfig(
                d_in=D_IN, d_sae=D_SAE, dtype=dtype, l1_coefficient=L1, l1_warm_up_steps=L1_WARM_UP
            )
        )
        with torch.no_grad():
            self.sae.W_enc.copy_(start.W_enc)
            self.sae.b_enc.copy_(start.b_enc)
            self.sae.W_dec.copy_(start.W_dec)
            self.sae.b_dec.copy_(start.b_dec)
        config = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            total_training_samples=10**6, device="cpu", autocast=False, lr=LR, lr_end=LR,
            lr_scheduler_name="constant", lr_warm_up_steps=LR_WARM_UP, adam_beta1=0.9,
            adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=ROWS,
            dead_feature_window=1000, feature_sampling_window=2000,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self.trainer = SAETrainer(cfg=config, sae=self.sae, data_provider=iter([]))

    def step(self, i: int, x: Tensor) -> float:
        return self.trainer.step(x).loss.item()

    def weights(self) -> dict[str, Tensor]:
        sae = self.sae
        return {
            "W_enc_rows": sae.W_enc.T,
            "b_enc": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }


class DictionaryLearningTrainer:
    def __init__(self, start: Parameters) -> None:
        standard = pytest.importorskip(
            "dictionary_learning.trainers.standard",
            reason="dictionary_learning is not installed: make peers",
        )
        self.trainer = standard.StandardTrainer(
            steps=10**6, activation_dim=D_IN, dict_size=D_SAE, layer=0, lm_name="", lr=LR,
            l1_penalty=L1, warmup_steps=LR_WARM_UP, sparsity_warmup_steps=L1_WARM_UP,
            resample_steps=None, device="cpu",
        )  # fmt: skip
        self.ae = self.trainer.ae.to(start.W_dec.dtype)
        with torch.no_grad():
            self.ae.encoder.weight.copy_(start.W_enc_rows)
            self.ae.encoder.bias.copy_(start.b_enc)
            self.ae.decoder.weight.copy_(start.W_dec.T)
            self.ae.bias.copy_(start.b_dec)

    def step(self, i: int, x: Tensor) -> float:
        with torch.no_grad():
            loss = self.trainer.loss(x, step=i).item()
        self.trainer.update(i, x)
        return loss

    def weights(self) -> dict[str, Tensor]:
        ae = self.ae
        return {
            "W_enc_rows": ae.encoder.weight,
            "b_enc": ae.encoder.bias,
            "W_dec": ae.decoder.weight.T,
            "b_dec": ae.bias,
        }


@precisions
@backends
def test_the_free_decoder_with_a_clipped_gradient_is_saelens_step(backend, dtype, limit):
    start = made_up(dtype, unit=False)
    theirs = SAELensTrainer(start)
    lr = [LR * min((i + 1) / LR_WARM_UP, 1) for i in range(STEPS)]
    seen = run_both(theirs, start, backend, lr, limit, decoder_norm="free", max_grad_norm=1.0)
    norms = [result.grad_norm for result in seen]
    assert max(norms) > 1, "no gradient was ever clipped"


@precisions
@backends
def test_the_unit_norm_decoder_is_the_step_of_dictionary_learning(backend, dtype, limit):
    start = made_up(dtype, unit=True)
    theirs = DictionaryLearningTrainer(start)
    lr = [LR * min(i / LR_WARM_UP, 1) for i in range(STEPS)]
    run_both(theirs, start, backend, lr, limit)
