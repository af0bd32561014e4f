"""One file per kind of artefact: what it is a function of (its key), and how it is committed.

    activations ◄─ corpus, host model      features        ◄─ activations, sae
    saes        ◄─ activations             interpretations ◄─ features
    trials      ◄─ activations             campaigns       ◄─ all of them

Nothing here schedules or distributes; the workers call these functions where the work happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sae_ext.store import Manifest, Store, stage_key


class Stage(NamedTuple):
    """An artefact to be: its kind, its configuration and the keys of its inputs."""

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        """The artefact's address in the store."""
        return stage_key(self.kind, self.config, self.inputs)

    def done(self, store: Store) -> bool:
        """Whether the artefact is complete in the store."""
        return store.complete(self.kind, self.key)

    def commit(
        self,
        store: Store,
        files: Mapping[str, dict[str, Any]],
        extra: Mapping[str, Any],
        timings: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Write the manifest; every file must have been put before."""
        return store.commit(
            self.kind,
            self.key,
            config=self.config,
            inputs=self.inputs,
            files=files,
            extra=extra,
            timings=timings,
        )
