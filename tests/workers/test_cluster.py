"""Joining a cluster that is not there, or not starting one at all."""

from __future__ import annotations

import pytest

from sae_ext.errors import UserError
from workers.cluster import Cluster


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_an_address_that_does_not_answer_is_named(address):
    cluster = Cluster(address)
    with pytest.raises(UserError, match="does not answer"):
        cluster.wait()
    cluster.stop()


def test_the_address_of_the_environment_counts(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert Cluster().address == "127.0.0.1:1"
    assert Cluster("127.0.0.1:2").address == "127.0.0.1:2"


def test_stopping_what_was_never_started_does_nothing():
    Cluster().stop()
