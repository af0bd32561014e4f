"""A peer's training from the first step to the last, in `.venv-peers` (`make peers`).

    python -m benchmarks.quality.peers REQUEST.json

The request names the peer, the rows, the settings, λ and a seed; the answer is its weights, by our names,
and the seconds the steps took. Each peer is used as its own users do; only rows, their order, and what
`Settings` fixes are ours.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.quality.problem import Settings, batches

Weights = dict[str, Tensor]


class _SAELens:
    """StandardTrainingSAE: free decoder, L1 weighted by its norms, gradient clipped to norm 1."""

    def __init__(self, d_in: int, settings: Settings, l1: float) -> None:
        from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self._sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(
                d_in=d_in,
                d_sae=settings.d_sae,
                l1_coefficient=l1,
                l1_warm_up_steps=settings.l1_warmup,
            )
        )
        config = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            total_training_samples=settings.steps * settings.batch_rows, device="cpu",
            autocast=False, lr=settings.lr, lr_end=0.0, lr_scheduler_name="constant",
            lr_warm_up_steps=settings.lr_warmup, lr_decay_steps=settings.lr_decay,
            adam_beta1=0.9, adam_beta2=0.999, n_restart_cycles=1,
            train_batch_size_samples=settings.batch_rows, dead_feature_window=1000,
            feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self._trainer = SAETrainer(cfg=config, sae=self._sae, data_provider=iter([]))

    def step(self, number: int, x: Tensor) -> None:
        self._trainer.step(x)

    def weights(self) -> Weights:
        sae = self._sae
        return {
            "W_enc_rows": sae.W_enc.T,
            "b_enc": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }


class _DictionaryLearning:
    """StandardTrainer: unit-norm decoder, projected gradient."""

    def __init__(self, d_in: int, settings: Settings, l1: float) -> None:
        from dictionary_learning.trainers.standard import StandardTrainer

        self._trainer = StandardTrainer(
            steps=settings.steps, activation_dim=d_in, dict_size=settings.d_sae, layer=0, lm_name="",
            lr=settings.lr, l1_penalty=l1, warmup_steps=settings.lr_warmup,
            sparsity_warmup_steps=settings.l1_warmup,
            decay_start=settings.steps - settings.lr_decay, resample_steps=None, device="cpu",
        )  # fmt: skip

    def step(self, number: int, x: Tensor) -> None:
        self._trainer.update(number, x)

    def weights(self) -> Weights:
        ae = self._trainer.ae
        return {
            "W_enc_rows": ae.encoder.weight,
            "b_enc": ae.encoder.bias,
            "W_dec": ae.decoder.weight.T,
            "b_dec": ae.bias,
        }


PEERS: dict[str, Callable[[int, Settings, float], _SAELens | _DictionaryLearning]] = {
    "SAELens": _SAELens,
    "dictionary_learning": _DictionaryLearning,
}


def main(request: Path) -> None:
    """Train as asked, and leave weights and seconds beside the request."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    settings = Settings(**asked["settings"])
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    path = Path(asked["x"])
    peer, seconds = None, 0.0
    for number, rows in enumerate(batches(path, settings, asked["seed"])):
        x = torch.from_numpy(rows)
        if peer is None:
            peer = PEERS[asked["peer"]](x.shape[1], settings, asked["l1"])
        started = time.perf_counter()
        peer.step(number, x)
        seconds += time.perf_counter() - started
    assert peer is not None
    weights = {name: t.detach().contiguous() for name, t in peer.weights().items()}
    save_file(weights, request.with_suffix(".safetensors"))
    request.with_suffix(".out").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
