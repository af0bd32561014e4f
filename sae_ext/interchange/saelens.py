"""SAELens 6: folders its `SAE.load_from_disk` opens, architectures `standard`, `topk` and `jumprelu`.

    saelens.write(sae, Path("out"), {"model_name": ..., "hook_name": ...}, clip_rate=0.0)
    sae = saelens.read(Path("their-folder"))

SAELens ignores what it does not know: an SAE with a clip or an output activation would be read there as
one without. Such SAEs are refused, except for a clip that was measured to make no difference.
Checked with 6.54.12.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sae_ext.architectures import ReLU, Thresholds, TopK
from sae_ext.errors import UserError
from sae_ext.interchange.checks import check_representable, clip_facts, widened
from sae_ext.interchange.folder import write_folder
from sae_ext.model import CFG_FILE, SAE, WEIGHTS_FILE, contents

_RESCALED = "rescale_acts_by_decoder_norm"
_KNOWN = (ReLU, TopK, Thresholds)


def difference(sae: SAE, clip_rate: float | None) -> str | None:
    """Why SAELens would not give the same numbers as this SAE; None where it does.

    Args:
        clip_rate: as in `write`.
    """
    try:
        check_representable(sae, "SAELens", _KNOWN)
        clip_facts(sae, "SAELens", clip_rate=clip_rate, allow_clip=False)
    except UserError as error:
        return str(error)
    return None


def write(
    sae: SAE,
    folder: Path,
    metadata: dict[str, Any],
    *,
    clip_rate: float | None,
    allow_clip: bool = False,
) -> None:
    """Write a folder that SAELens opens with the same weights, bit for bit.

    Args:
        metadata: what the activations are. SAELens' own activation store asks for `model_name`,
            `hook_name`, `context_size` and `prepend_bos`. `activation_clip`, `activation_clip_rate`
            and `exact` (whether SAELens gives the same numbers) are added.
        clip_rate: share of firings at the clip as measured; None where it was not, or there is no clip.
        allow_clip: write an SAE of which some firings are clipped, with a warning.

    Raises:
        UserError: SAELens cannot represent the SAE, or the folder is in use.
    """
    check_representable(sae, "SAELens", _KNOWN)
    facts = clip_facts(sae, "SAELens", clip_rate=clip_rate, allow_clip=allow_clip)
    try:
        files = sae.files({**metadata, **facts})
    except (TypeError, ValueError) as error:
        raise UserError(f"the metadata cannot be written as JSON: {error}") from error
    write_folder(folder, files)


def read(folder: Path) -> SAE:
    """An SAE that SAELens saved, whatever the lengths of its decoder rows.

    Weights of 16 bits are widened to float32. A clip in the metadata, which `write` leaves there, is
    applied; it is in the units of the features as they were then.

    Raises:
        UserError: a file is missing or unreadable; another architecture, or one only for training; the
            activations are to be changed on their way in.
    """
    cfg, tensors = contents(folder)
    cfg = _for_inference(cfg, folder)
    tensors = widened(tensors, str(folder / WEIGHTS_FILE))
    if cfg.get(_RESCALED):
        cfg = {**cfg, _RESCALED: False}
        tensors = _rescaled(tensors, folder)
    return SAE.from_contents(cfg, tensors, folder)


def _for_inference(cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The entries without those that only training uses, which SAELens itself lists."""
    metadata = cfg.get("metadata")
    if not isinstance(metadata, dict) or _major(metadata.get("sae_lens_version")) < 6:
        raise UserError(
            f"{folder}: metadata.sae_lens_version in {CFG_FILE} is not 6 or later, and before that other "
            "entries changed the numbers: load the SAE in SAELens 6 and save it again"
        )
    if cfg.get("architecture") == "batchtopk":
        raise UserError(
            f"{folder}: architecture in {CFG_FILE} is 'batchtopk', which is for training alone: save "
            "the SAE in SAELens with save_inference_model, which makes it a jumprelu"
        )
    details = metadata.get("training_architecture_details") or {}
    return {name: value for name, value in cfg.items() if name not in details}


def _major(version: object) -> int:
    """The first number of a version, 0 where there is none."""
    first = str(version).split(".")[0]
    return int(first) if first.isdecimal() else 0


def _rescaled(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Features in units where decoder rows have length 1, as SAELens chooses and counts them there."""
    try:
        W_dec = tensors["W_dec"]
        norm = W_dec.norm(dim=-1).clamp(min=1e-8)
        return {
            **tensors,
            "W_enc": tensors["W_enc"] * norm,
            "b_enc": tensors["b_enc"] * norm,
            "W_dec": W_dec / norm[:, None],
        }
    except (KeyError, RuntimeError, IndexError) as error:
        raise UserError(f"{folder}: {WEIGHTS_FILE} cannot be read ({error})") from error
