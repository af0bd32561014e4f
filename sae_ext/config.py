"""Every knob of the library, one frozen dataclass per stage, each field documented under itself.

Plain standard-library dataclasses, so that this module costs nothing to import and works in a
notebook; the recipe of a campaign composes them and refuses unknown keys. A config holds only
what changes the result: how many workers share the work belongs to `flows.recipe.Resources`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_ext.architectures import AnyArchitecture, ReLU
from sae_ext.corpora.config import CorpusConfig
from sae_ext.fields import STRICT, from_dict, require, require_finite, to_dict, with_changes
from sae_ext.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """How activations are stored."""

    __pydantic_config__ = STRICT

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of the stored activations."""
    unit_kb: float = 128.0
    """Kilobytes of text in one work unit, whose rows are a shard: about 32,000 tokens of English, so 256 MB of
    float16 at a width of 4096. What is lost when a worker dies."""
    not_finite: Literal["refuse", "drop"] = "refuse"
    """What is done about documents with a NaN or an infinity in their rows: stop, or leave them out, recorded."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.unit_kb > 0, f"unit_kb must be positive, got {self.unit_kb}")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The sparse autoencoder. x̂ = output(z W_dec + b_dec), z an activation of (x - b_dec) W_enc + b_enc."""

    __pydantic_config__ = STRICT

    d_sae: int = 3072
    """Number of features."""
    d_in: int | None = None
    """Width of the activations; checked against the host model when given."""
    architecture: AnyArchitecture = ReLU()
    """Which entries are active, see `sae_ext.architectures`."""
    decoder: Literal["free", "unit"] = "free"
    """`free` lets decoder rows move and weighs the L1 term by their lengths, which reconstructs better at the same
    L0 (docs/training.md); `unit` keeps them at length 1, so that activations of all features compare."""
    output: Literal["identity", "sigmoid", "tanh"] = "identity"
    """Applied to the reconstruction; other than `identity` it takes `train.scale: none`."""
    b_dec: Literal["mean", "geometric_median", "zero"] = "mean"
    """Where the decoder's bias begins: at a centre of the training rows, or at 0."""

    def __post_init__(self) -> None:
        require(self.d_sae > 0, f"d_sae must be positive, got {self.d_sae}")
        require(self.d_in is None or self.d_in > 0, f"d_in must be positive, got {self.d_in}")
        self.architecture.check(self.d_sae)


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Bayesian search over learning rate and λ by scikit-optimize, judged on validation documents."""

    __pydantic_config__ = STRICT

    trials: int = 0
    """Number of trials; 0 trains the configuration as it is written."""
    steps: int | None = None
    """Steps of one trial; as many as the final training when absent."""
    lr: tuple[float, float] = (3e-4, 3e-3)
    """Range of the learning rate, searched in log space."""
    l1: tuple[float, float] = (1.0, 8.0)
    """Range of λ, searched in log space."""
    l0_band: tuple[float, float] = (16.0, 64.0)
    """Wanted mean number of active features per row; a trial outside is worse than any inside."""
    parallel: int = 2
    """Trials at once; they are proposed together, so this is part of what the search finds."""
    initial_trials: int = 4
    """Space-filling trials before the model guides the search; must be fewer than `trials`."""
    seed: int = 0
    """Seed of the search."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.trials >= 0, f"trials must be 0 or more, got {self.trials}")
        require(self.parallel > 0, f"parallel must be at least 1, got {self.parallel}")
        require(self.steps is None or self.steps > 0, f"steps must be at least 1, got {self.steps}")
        for name in ("lr", "l1", "l0_band"):
            low, high = getattr(self, name)
            require(
                0 < low < high,
                f"{name} must be [low, high] with 0 < low < high, got [{low}, {high}]",
            )
        require(
            self.initial_trials > 0 and (self.trials == 0 or self.initial_trials < self.trials),
            f"initial_trials must be at least 1 and fewer than trials ({self.trials}), got "
            f"{self.initial_trials}: with no guided trial there is no search",
        )


@dataclass(frozen=True, kw_only=True)
class AnalyseConfig:
    """What is gathered about each feature in one pass over the activations."""

    __pydantic_config__ = STRICT

    window: int = 32
    """Tokens in one evidence window (documents are cut into windows of this length)."""
    top_k: int = 24
    """Windows kept per feature with the strongest activation, at most two per document."""
    sample: int = 160
    """Firing windows kept per feature as a uniform sample, for scoring."""
    pool: int = 4096
    """Random windows shared by all features, from which verified non-firing examples are drawn."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        for name in ("window", "top_k", "sample", "pool"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}"
            )


@dataclass(frozen=True, kw_only=True)
class InterpretConfig:
    """How features are explained in words and how the explanations are scored."""

    __pydantic_config__ = STRICT

    features: int = 100
    """How many features to interpret: a seeded random choice among those with enough evidence."""
    backend: Literal["rules", "openai"] = "rules"
    """`rules`: log-odds keywords, the baseline without a language model. `openai`: any server that
    speaks the OpenAI chat API."""
    base_url: str | None = None
    """Address of the server, such as http://127.0.0.1:8000/v1 (openai only)."""
    model: str | None = None
    """Model name the server knows (openai only)."""
    examples: int = 12
    """Firing windows shown to the explainer."""
    positives: int = 20
    """Held-out firing windows the judge sees per feature."""
    negatives: int = 20
    """Held-out windows, verified not to fire, the judge sees per feature."""
    seed: int = 0
    """Seed of every choice above."""

    def __post_init__(self) -> None:
        for name in ("features", "examples", "positives", "negatives"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        if self.backend == "openai":
            require(
                bool(self.base_url),
                "base_url is needed for backend 'openai': add base_url or --base-url",
            )
            require(bool(self.model), "model is needed for backend 'openai': add model or --model")


__all__ = [
    "AnalyseConfig",
    "CorpusConfig",
    "HarvestConfig",
    "InterpretConfig",
    "SAEConfig",
    "TrainConfig",
    "TuneConfig",
    "from_dict",
    "to_dict",
    "with_changes",
]
