"""SAEs: a folder SAELens loads as it is, with how it was trained and a checkpoint to go on from.

`cfg.json`, `sae_weights.safetensors`, `sparsity.safetensors` (SAELens' layout), `training.json`,
`history.parquet` and `events.parquet` (`sae_ext.training.history`), `checkpoint/state.safetensors`, and
where they are kept `checkpoints/step-NNNNNNNN/`, SAE folders of earlier steps. A tuning trial is an SAE like
any other, so a promoted trial is not trained again; so is one that was made elsewhere and taken in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as save_tensors

from sae_ext import hosts
from sae_ext.activations.dataset import Dataset, Stream
from sae_ext.activations.reader import Activations
from sae_ext.activations.streaming import Streamed, here, streamed
from sae_ext.artefacts import Stage
from sae_ext.config import CorpusConfig, HarvestConfig, SAEConfig, TrainConfig, from_dict, to_dict
from sae_ext.corpora import STDLIB
from sae_ext.errors import Diverged, UserError
from sae_ext.metrics import evaluate
from sae_ext.model import SAE
from sae_ext.store import Store, table_bytes
from sae_ext.training.checks import check_together
from sae_ext.training.history import Line, events_table, history_table
from sae_ext.training.job import Job, Place, Progress, Trained
from sae_ext.training.run import EVALUATION_BATCH, train_many

KIND = "saes"
CHECKPOINT = "checkpoint/state.safetensors"
CHECKPOINTS = "checkpoints"
_SPARSITY_FLOOR = 1e-10


class Streaming(NamedTuple):
    """Documents that are trained on without being stored."""

    corpus: CorpusConfig
    fingerprint: str
    """Hash over what they are read from."""


def stage(
    sae: SAEConfig, config: TrainConfig, activations: str, stream: Streaming | None = None
) -> Stage:
    """An SAE trained on the activations with that key, or on a stream and judged by them.

    Raises:
        UserError: it begins from a folder that holds none, or one that goes with another training.
    """
    inputs = {"activations": activations}
    if (begun := sae.architecture.begins_from()) is not None:
        inputs["pretrained"] = begun
        check_together(sae, config)
    content = {"sae": shape(sae), "train": to_dict(config)}
    if stream is not None:
        content["stream"] = to_dict(stream.corpus)
        inputs["stream"] = stream.fingerprint
    return Stage(KIND, content, inputs)


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


def train_and_commit(
    store: Store,
    stages: Sequence[Stage],
    *,
    place: Place = Place(),
    stop: Callable[[], bool] = lambda: False,
    on_line: Callable[[int, Line], object] = lambda number, line: None,
    stream: Stream | None = None,
) -> Generator[Progress, None, list[dict[str, Any] | Diverged]]:
    """Train on the same activations in one pass, or go on from the last checkpoints, and commit; yields progress.

    Args:
        on_line: called with an SAE's number and each line of its history.
        stream: the one the stages were made with; computed in this process where absent.

    Returns:
        Of each the metrics on the validation split, or why it diverged and is not committed; of several
        workers on one SAE only the first commits.

    Raises:
        UserError, Stopped: as `sae_ext.training.run.train`.
    """
    activations = Activations(store, stages[0].inputs["activations"])
    for stage in stages:
        _check_pretrained(stage)
    files: list[dict[str, dict[str, Any]]] = [{} for _ in stages]
    jobs = [
        _job(store, stage, files[number], partial(on_line, number))
        for number, stage in enumerate(stages)
    ]
    source = _data_of(activations, stages, stream, place.device)
    trained = yield from train_many(source, jobs, place=place, stop=stop)
    for stage, made, result in zip(stages, files, trained, strict=True):
        if isinstance(result, Diverged) or place.share[0] > 0:
            continue
        for name, data in _contents(result, activations, stage).items():
            made[name] = store.put(KIND, stage.key, name, data)
        extra = {
            "validation": result.validation,
            "penalty": result.penalty,
            "steps": result.steps,
            "seed": stage.config["train"]["seed"],
        }
        stage.commit(store, made, extra)
    return [r if isinstance(r, Diverged) else r.validation for r in trained]


def _data_of(
    activations: Activations, stages: Sequence[Stage], stream: Stream | None, device: str
) -> Dataset:
    """What is read: the activations, or a stream beside them."""
    asked = [(stage.config.get("stream"), stage.inputs.get("stream")) for stage in stages]
    if any(each != asked[0] for each in asked):
        raise UserError("SAEs that share their reads must agree on the stream")
    content, fingerprint = asked[0]
    if content is None or fingerprint is None:
        return activations
    if stream is None:
        made = activations.manifest.config
        host, harvest = hosts.from_content(made["host"]), from_dict(HarvestConfig, made["harvest"])
        corpus = from_dict(CorpusConfig, content)
        stream = streamed(host, corpus, harvest, here(host.open(device), harvest))
    return Streamed(activations, stream, fingerprint)


def _check_pretrained(stage: Stage) -> None:
    """What the SAE begins from is what its key was made of."""
    sae = from_dict(SAEConfig, stage.config["sae"])
    if sae.architecture.begins_from() != stage.inputs.get("pretrained"):
        raise UserError(
            "the SAE under sae.architecture.pretrained is not, on the machine that trains, the one this run was "
            "started with: leave it as it was until the training has ended, or start again"
        )


def _job(
    store: Store,
    stage: Stage,
    files: dict[str, dict[str, Any]],
    on_line: Callable[[Line], object],
) -> Job:
    """The job of a stage; what it puts into the store is noted in `files`."""

    def save(data: bytes) -> None:
        files[CHECKPOINT] = store.put(KIND, stage.key, CHECKPOINT, data)

    def load_saved() -> bytes | None:
        if not store.has_file(KIND, stage.key, CHECKPOINT):
            return None
        data = store.read(KIND, stage.key, CHECKPOINT)
        files[CHECKPOINT] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name in store.names(KIND, stage.key, CHECKPOINTS):
            files[name] = store.facts(KIND, stage.key, name)
        return data

    def keep(step: int, sae: SAE, seen: dict[str, Any]) -> None:
        metadata = {"step": step, "l0": seen["l0"], "fvu": seen["fvu"]}
        for name, data in sae.files(metadata).items():
            path = f"{CHECKPOINTS}/step-{step:08d}/{name}"
            files[path] = store.put(KIND, stage.key, path, data)

    return Job(
        from_dict(SAEConfig, stage.config["sae"]),
        from_dict(TrainConfig, stage.config["train"]),
        load_checkpoint=load_saved, save_checkpoint=save, keep=keep, on_line=on_line,
    )  # fmt: skip


def take_in(store: Store, sae: SAE, activations: str) -> tuple[Stage, dict[str, Any]]:
    """Commit an SAE made elsewhere, judged on the validation rows of some activations.

    Raises:
        UserError: its width is another, or the validation split is empty.
    """
    source = Activations(store, activations)
    if sae.d_in != source.d_in:
        raise UserError(
            f"the SAE reads rows of width {sae.d_in}, but the activations {activations} have {source.d_in}: "
            "give the activations it was trained for"
        )
    rows = source.rows("validation")
    if len(rows) == 0:
        raise UserError(
            f"the validation split of {activations} has no rows: give other activations"
        )
    files = sae.files({})
    digest = hashlib.sha256(b"".join(files[name] for name in SAE.FILES)).hexdigest()
    stage = Stage(KIND, {"imported": digest[:16]}, {"activations": activations})
    seen = evaluate(sae, source.in_order(rows, EVALUATION_BATCH))
    validation = seen.metrics()
    contents = {
        **sae.files(metadata(source.manifest.config, validation)),
        "sparsity.safetensors": save_tensors({"sparsity": _log_density(seen.fired / seen.rows)}),
        "training.json": json.dumps({"config": stage.config, "validation": validation}).encode(),
        "history.parquet": table_bytes(history_table([], [])),
        "events.parquet": table_bytes(events_table([])),
    }
    stage.commit(
        store,
        {name: store.put(KIND, stage.key, name, data) for name, data in contents.items()},
        {"validation": validation},
    )
    return stage, validation


def metadata(
    source: dict[str, Any], validation: dict[str, Any], stream: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What SAELens wants to know about activations harvested with this configuration, or of a stream of documents
    read with the same host, and what was measured."""
    return {
        **hosts.from_content(source["host"]).described(),
        "dataset_path": (stream or source["corpus"])["source"] or STDLIB,
        "activation_clip_rate": validation["clip_rate"],
        "l0": validation["l0"],
    }


def _contents(trained: Trained, activations: Activations, stage: Stage) -> dict[str, bytes]:
    told = metadata(activations.manifest.config, trained.validation, stage.config.get("stream"))
    return {
        **trained.sae.files(told),
        "sparsity.safetensors": save_tensors({"sparsity": _log_density(trained.density.numpy())}),
        "training.json": trained.told(stage.config, activations.key),
        "history.parquet": table_bytes(trained.history),
        "events.parquet": table_bytes(trained.events),
    }


def _log_density(density: npt.NDArray[np.float64]) -> torch.Tensor:
    """log10 of each feature's firing rate on the validation split, as SAELens keeps it."""
    return torch.log10(torch.from_numpy(density).float() + _SPARSITY_FLOOR)
