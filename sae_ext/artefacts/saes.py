"""SAEs: a folder SAELens loads as it is, with how it was trained and a checkpoint to go on from.

`cfg.json`, `sae_weights.safetensors`, `sparsity.safetensors` (SAELens' layout), `training.json`,
`history.parquet` (columns: `sae_ext.training.HISTORY_COLUMNS`), `checkpoint/state.safetensors`.
A tuning trial is an SAE like any other, so a promoted trial is not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from sae_ext.activations.reader import Activations
from sae_ext.artefacts import Stage
from sae_ext.config import SAEConfig, TrainConfig, to_dict
from sae_ext.model import SAE
from sae_ext.store import Store, table_bytes
from sae_ext.training import Progress, Trained, train

KIND = "saes"
CHECKPOINT = "checkpoint/state.safetensors"
_SPARSITY_FLOOR = 1e-10


def stage(sae: SAEConfig, config: TrainConfig, activations: str) -> Stage:
    """An SAE trained on the activations with that key."""
    return Stage(KIND, {"sae": shape(sae), "train": to_dict(config)}, {"activations": activations})


def shape(sae: SAEConfig) -> dict[str, Any]:
    """The part of the configuration that decides the content; `d_in` is only a check."""
    return {name: value for name, value in to_dict(sae).items() if name != "d_in"}


def load(store: Store, key: str) -> SAE:
    """The SAE of an artefact, for raw activations.

    Raises:
        UserError: no such artefact, or its files do not match their checksums.
    """
    folder = [store.local(KIND, key, name, verify=True).parent for name in SAE.FILES]
    return SAE.load(folder[0])


def train_and_commit(store: Store, stage: Stage) -> Generator[Progress, None, dict[str, Any]]:
    """Train, or go on from the last checkpoint, and commit; yields progress.

    Returns:
        The metrics on the validation split.
    """
    activations = Activations(store, stage.inputs["activations"])
    checkpoint: dict[str, dict[str, Any]] = {}

    def save(data: bytes) -> None:
        checkpoint[CHECKPOINT] = store.put(KIND, stage.key, CHECKPOINT, data)

    def load_saved() -> bytes | None:
        if not store.has_file(KIND, stage.key, CHECKPOINT):
            return None
        checkpoint[CHECKPOINT] = store.facts(KIND, stage.key, CHECKPOINT)
        return store.read(KIND, stage.key, CHECKPOINT)

    trained = yield from train(
        activations,
        SAEConfig(**stage.config["sae"]),
        TrainConfig(**stage.config["train"]),
        load_checkpoint=load_saved,
        save_checkpoint=save,
    )
    files = {
        name: store.put(KIND, stage.key, name, data)
        for name, data in _contents(trained, activations, stage).items()
    }
    stage.commit(store, checkpoint | files, {"validation": trained.validation})
    return trained.validation


def _contents(trained: Trained, activations: Activations, stage: Stage) -> dict[str, bytes]:
    source = activations.manifest.config
    metadata = {
        "model_name": source["host"]["model"],
        "model_class_name": "AutoModel",
        "hook_name": f"residual_after_block_{source['host']['layer']}",
        "hook_head_index": None,
        "context_size": source["host"]["max_tokens"],
        "prepend_bos": True,  # the host model always reads them; whether their rows are kept differs
        "exclude_special_tokens": source["harvest"]["drop_special_tokens"],
        "dataset_path": source["corpus"]["source"],
        "activation_clip_rate": trained.validation["clip_rate"],
        "l0": trained.validation["l0"],
    }
    training = {
        "config": stage.config,
        "activations": activations.key,
        "scale": trained.scale,
        "reduction": "mean over rows; sum over inputs (error) and over features (L1)",
        "validation": trained.validation,
    }
    return {
        **trained.sae.files(metadata),
        "sparsity.safetensors": save_tensors({"sparsity": _log_density(trained)}),
        "training.json": json.dumps(training, indent=1, sort_keys=True).encode(),
        "history.parquet": table_bytes(trained.history),
    }


def _log_density(trained: Trained) -> torch.Tensor:
    """log10 of each feature's firing rate on the validation split, as SAELens keeps it."""
    return torch.log10(trained.density.float() + _SPARSITY_FLOOR)
