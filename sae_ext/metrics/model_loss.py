"""How well a model still works when a module's output is replaced by its reconstruction.

    seen = model_loss(model, "transformer.h.5", sae, batches, loss=next_token_ce,
                      predictions=next_token, mask=attention_mask, mean=mean)
    seen.metrics()["loss_recovered_zero"]

Each batch runs through the model clean, with the output reconstructed, set to zero and set to its
mean. With L the mean loss and KL(clean ‖ patched) the mean divergence of the predictions:
    loss recovered = (L_ablated - L_sae) / (L_ablated - L_clean)     1: as good as clean, 0: as ablated
    KL score       = (KL_ablated - KL_sae) / KL_ablated
Sums are float64 over items (predicted tokens, rows), ratios taken once at the end. The model's
weights, modes and hooks are as before afterwards, also after an error.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sae_ext.errors import UserError
from sae_ext.model import SAE

ABLATIONS = ("zero", "mean")
_PATCHED = ("sae", *ABLATIONS)
_ROUNDING = 1e-6
"""A difference of losses below this fraction of the loss is what float32 leaves of zero."""
_KL_ROUNDING = 1e-12
_KL_ROWS = 256


class Predictions(NamedTuple):
    """A model's categorical predictions for a batch."""

    logits: Tensor
    """[n, C]"""
    targets: Tensor | None
    """int64 [n], the true categories where there are any."""


Loss = Callable[[Any, Any], Tensor]
"""(output of the model, batch) -> loss of each item, [n]."""


# -- what models are scored by -------------------------------------------------------------------


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output: batches that are mappings are its keyword arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def attention_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """[B, T], true for tokens and false for padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def next_token(output: Any, batch: Mapping[str, Tensor]) -> Predictions:
    """A causal language model's predictions of each token that follows another, padding left out.

    Args:
        output: holds `logits` [B, T, V].
        batch: holds `input_ids` [B, T] and, where there is padding, `attention_mask`.
    """
    return Predictions(*_next_token(output, batch))


def _next_token(output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    mask = attention_mask(batch)
    follows = mask[:, 1:] & mask[:, :-1]
    return output.logits[:, :-1][follows], batch["input_ids"][:, 1:][follows]


def next_token_ce(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of each token that `next_token` predicts."""
    logits, targets = _next_token(output, batch)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def multilabel_bce(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Binary cross-entropy in nats of each row, mean over its labels.

    Args:
        output: logits [B, C], or what holds them as `logits`.
        batch: holds `labels` [B, C], 0 or 1.
    """
    logits = output if isinstance(output, Tensor) else output.logits
    targets = batch["labels"].to(torch.float32)
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=1)


# -- patching a model ----------------------------------------------------------------------------


@contextmanager
def patched(
    model: nn.Module,
    path: str,
    replace: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
) -> Iterator[None]:
    """While open, the output of the module at `path` passes through `replace`.

    Args:
        model: any module that contains others.
        path: as in `model.named_modules()`, such as "transformer.h.5".
        replace: rows [n, d] -> rows [n, d]. They come from the output [..., d], or from the first
            element of it where it is a tuple.
        mask: [...], true where rows are replaced; others pass unchanged. All when absent.

    Raises:
        UserError: there is no such module, it did not run, its output is no tensor, or `mask` or
            the replaced rows have another shape.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if path not in modules:
        near = difflib.get_close_matches(path, modules, n=5, cutoff=0.4)
        hint = f"near names are {', '.join(near)}" if near else "see model.named_modules()"
        raise UserError(f"the model has no module {path!r}: {hint}")
    ran = False

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal ran
        ran = True
        if isinstance(output, tuple):
            return (_replaced(output[0], replace, mask, path), *output[1:])
        return _replaced(output, replace, mask, path)

    handle = modules[path].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not ran:
        raise UserError(f"module {path!r} did not run in the model's forward: choose one that does")


def _replaced(
    output: Any, replace: Callable[[Tensor], Tensor], mask: Tensor | None, path: str
) -> Tensor:
    if not isinstance(output, Tensor):
        raise UserError(
            f"module {path!r} gives a {type(output).__name__}: choose one whose output is a tensor, "
            "or a tuple that begins with one"
        )
    positions = output.shape[:-1]
    if mask is None:
        mask = torch.ones(positions, dtype=torch.bool)
    if mask.shape != positions:
        raise UserError(
            f"the mask is {list(mask.shape)}, but module {path!r} has rows at {list(positions)}: "
            "give a mask of that shape"
        )
    chosen = mask.to(output.device).bool()
    rows = output[chosen]
    new = replace(rows)
    if new.shape != rows.shape:
        raise UserError(
            f"rows {list(rows.shape)} of module {path!r} were to be replaced by {list(new.shape)}: "
            "the shapes must be the same"
        )
    result = output.clone()
    result[chosen] = new.to(output)
    return result


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


# -- measuring -----------------------------------------------------------------------------------


class ModelLossSums:
    """Mergeable sums over items, by quantity and by what was done to the model."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], float] = defaultdict(float)

    def add_losses(self, way: str, losses: Tensor) -> None:
        """Add the losses [n] of a batch's items, run in the given way: clean, sae, zero or mean."""
        if losses.ndim != 1:
            raise UserError(
                f"loss gave {list(losses.shape)}: it must give one number per item, [n]"
            )
        self.sums["items", way] += len(losses)
        self.sums["loss", way] += float(losses.double().sum())

    def add_predictions(self, way: str, clean: Predictions, found: Predictions) -> None:
        """Add a batch's predictions, run in the given way, beside those of the clean model."""
        best = found.logits.argmax(dim=1)
        self.sums["predictions", way] += len(best)
        if found is not clean:
            self.sums["kl", way] += _kl(clean.logits, found.logits)
            self.sums["agree", way] += int((best == clean.logits.argmax(dim=1)).sum())
        if found.targets is not None:
            self.sums["targets", way] += len(found.targets)
            self.sums["correct", way] += int((best == found.targets).sum())

    def merge(self, other: ModelLossSums) -> None:
        """Add another partition's sums."""
        for key, value in other.sums.items():
            self.sums[key] += value

    def metrics(self) -> dict[str, Any]:
        """The metrics, per item; None for what was not run on every item.

        Returns:
            n_items; loss_* (clean, sae, zero, mean); loss_increase (sae over clean);
            loss_recovered_* against zero and mean ablation, None where the ablation does not hurt;
            kl_* and top1_agreement_* with the clean model (sae, zero, mean); kl_score_* (zero,
            mean), None where the ablation changes nothing; top1_accuracy_* (clean, sae, zero, mean).
        """
        n = int(self.sums.get(("items", "clean"), 0))
        if n == 0:
            return {"n_items": 0}
        every = ("clean", *_PATCHED)
        loss = {way: self._mean("loss", "items", way) for way in every}
        kl = {way: self._mean("kl", "predictions", way) for way in _PATCHED}
        agreement = {way: self._mean("agree", "predictions", way) for way in _PATCHED}
        accuracy = {way: self._mean("correct", "targets", way) for way in every}
        return {
            "n_items": n,
            **_named("loss", loss),
            "loss_increase": _minus(loss["sae"], loss["clean"]),
            **{f"loss_recovered_{way}": _loss_recovered(loss, way) for way in ABLATIONS},
            **_named("kl", kl),
            **{f"kl_score_{way}": _kl_score(kl, way) for way in ABLATIONS},
            **_named("top1_agreement", agreement),
            **_named("top1_accuracy", accuracy),
        }

    def _mean(self, quantity: str, counted: str, way: str) -> float | None:
        count = self.sums.get((counted, way), 0)
        if not count or count != self.sums.get((counted, "clean"), 0):
            return None
        return self.sums[quantity, way] / count


def mean_activation(
    model: nn.Module,
    path: str,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Tensor] | None = None,
    run: Callable[[nn.Module, Any], Any] = run,
) -> Tensor:
    """The mean output [d] of a module over the rows that `mask` chooses, in float64.

    Raises:
        UserError: see `patched`; or there is no row.
    """
    total: Tensor | None = None
    count = 0

    def add(rows: Tensor) -> Tensor:
        nonlocal total, count
        part = rows.double().sum(dim=0)
        total = part if total is None else total + part
        count += len(rows)
        return rows

    with _unchanged(model):
        for batch in batches:
            with patched(model, path, add, mask(batch) if mask else None):
                run(model, batch)
    if total is None or count == 0:
        raise UserError(f"module {path!r} gave no rows to take a mean of: give it batches")
    return total / count


def model_loss(
    model: nn.Module,
    path: str,
    sae: SAE,
    batches: Iterable[Any],
    *,
    loss: Loss,
    predictions: Callable[[Any, Any], Predictions] | None = None,
    mask: Callable[[Any], Tensor] | None = None,
    mean: Tensor | None = None,
    run: Callable[[nn.Module, Any], Any] = run,
) -> ModelLossSums:
    """Run batches through the model, clean and with one module's output replaced.

    Args:
        model: any module; it is run in evaluation mode without gradients.
        path: the module whose output the SAE reads, see `patched`.
        sae: reads the module's rows as they are, and rebuilds those (its target is x itself).
        batches: what `run` and `loss` take.
        loss: gives each item's loss, such as `next_token_ce`.
        predictions: gives categorical predictions for divergence and top-1, such as `next_token`;
            without it those are not computed.
        mask: gives the positions to replace, such as `attention_mask`; all when absent.
        mean: [d], the output's mean (`mean_activation`); without it there is no mean ablation.
        run: gives the model's output for a batch.

    Raises:
        UserError: see `patched`; or the SAE or `mean` has another width, or `loss` another shape.
    """
    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        "sae": lambda rows: sae.decode(sae.encode(rows)),
        "zero": torch.zeros_like,
    }
    if mean is not None:
        fixed = mean
        replacements["mean"] = lambda rows: fixed.to(rows).expand(len(rows), -1)
    sums = ModelLossSums()
    with _unchanged(model):
        for batch in batches:
            where = mask(batch) if mask else None
            output = run(model, batch)
            sums.add_losses("clean", loss(output, batch))
            clean = predictions(output, batch) if predictions else None
            if clean is not None:
                sums.add_predictions("clean", clean, clean)
            for way, replace in replacements.items():
                with patched(model, path, replace, where):
                    output = run(model, batch)
                sums.add_losses(way, loss(output, batch))
                if predictions and clean is not None:
                    sums.add_predictions(way, clean, predictions(output, batch))
    return sums


def _kl(clean: Tensor, found: Tensor) -> float:
    """Σ over rows of KL(softmax(clean) ‖ softmax(found)), some rows at a time in float64."""
    total = 0.0
    for p, q in zip(torch.split(clean, _KL_ROWS), torch.split(found, _KL_ROWS), strict=True):
        log_p, log_q = p.double().log_softmax(dim=1), q.double().log_softmax(dim=1)
        total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total


def _named(quantity: str, by_way: dict[str, float | None]) -> dict[str, float | None]:
    return {f"{quantity}_{way}": value for way, value in by_way.items()}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _loss_recovered(loss: dict[str, float | None], way: str) -> float | None:
    clean, ablated = loss["clean"], loss[way]
    gained, hurt = _minus(ablated, loss["sae"]), _minus(ablated, clean)
    if gained is None or hurt is None or clean is None or hurt <= _ROUNDING * abs(clean):
        return None
    return gained / hurt


def _kl_score(kl: dict[str, float | None], way: str) -> float | None:
    ablated = kl[way]
    gained = _minus(ablated, kl["sae"])
    return (
        None if gained is None or ablated is None or ablated <= _KL_ROUNDING else gained / ablated
    )
