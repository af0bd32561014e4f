"""`sparsemill interpret` with a language model behind a real OpenAI-compatible server."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "sae_ext" / "interpret"))
from tiny_chat_server import needs_serving, tiny_chat_server

from sae_ext.store import Store

pytestmark = [pytest.mark.slow, needs_serving]


def test_another_backend_reuses_everything_but_the_explanations(
    finished, sparsemill, recipe_file, tmp_path
):
    path = recipe_file(interpret={"positives": 4, "negatives": 4})
    with tiny_chat_server(tmp_path) as (base_url, model):
        command = sparsemill(
            "interpret", str(path), "--store", str(finished["store"]), "--backend", "openai",
            "--base-url", base_url, "--model", model, "--features", "3",
        )  # fmt: skip
        assert command.wait() == 0, command.output
    assert command.output.count("found") == 3
    store = Store(str(finished["store"]))
    newest = store.manifest("interpretations", store.list("interpretations")[0])
    told = newest.extra["summary"]
    assert (told["explainer_kind"], told["model"], told["n_features"]) == ("chat", model, 3)
    assert told["coverage"] < 1, "random weights do not answer every question"
    replies = sqlite3.connect(store.state_dir() / "replies.sqlite")
    tables = [
        name for (name,) in replies.execute("select name from sqlite_master where type='table'")
    ]
    assert (
        sum(replies.execute(f"select count(*) from {name}").fetchone()[0] for name in tables) >= 3
    )


def test_a_server_that_does_not_answer_is_named(finished, sparsemill, recipe_file):
    command = sparsemill(
        "interpret", str(recipe_file()), "--store", str(finished["store"]), "--backend", "openai",
        "--base-url", "http://127.0.0.1:1/v1", "--model", "m",
    )  # fmt: skip
    assert command.wait() == 2, command.output
    assert "http://127.0.0.1:1/v1" in command.output
    assert "Traceback" not in command.output
