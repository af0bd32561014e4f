"""A real `transformers serve` with a tiny random model: it answers, and everything is garbage."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from planted_corpus import CORPUS, SINGLE, SINGLE_2, Planted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_serve_available

from sae_ext.config import InterpretConfig
from sae_ext.errors import UserError
from sae_ext.interpret import check_server, interpret_features, interpret_with, make_plan, summary
from sae_ext.interpret.chat import ChatClient
from sae_ext.interpret.explain import LogOddsExplainer
from sae_ext.interpret.judge import ChatJudge

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason="needs `pip install transformers[serving]`"
    ),
]


def build_model(folder: Path) -> Path:
    """A chat model of 185,000 random weights, with a byte-level tokenizer trained on this file."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InterpretConfig]:
    folder = tmp_path_factory.mktemp("served")
    model = build_model(folder / "model")
    (folder / "hub").mkdir()
    port, log = free_port(), folder / "log"
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_CACHE": str(folder / "hub"),
                "OMP_NUM_THREADS": "1",
            },
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield InterpretConfig(
            backend="openai",
            base_url=f"http://127.0.0.1:{port}/v1",
            model=str(model),
            positives=5,
            negatives=5,
            examples=4,
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_garbage_explanations_are_failures_without_a_score(served, planted: Planted, tmp_path):
    check_server(served)
    plan = make_plan(planted.firing_rate, planted.reader, served, CORPUS)
    result = interpret_features(
        [SINGLE, SINGLE_2], planted.reader, plan, served, CORPUS, cache=tmp_path / "replies.db"
    )
    assert set(result.explanations["status"].to_pylist()) == {"failed"}
    assert result.explanations["text"].null_count == 2
    found = summary(result.scores, plan)
    assert (found["coverage"], found["n_scored"], found["median_lift"]) == (0, 0, None)


def test_garbage_answers_lower_coverage_and_invent_no_score(served, planted: Planted, tmp_path):
    plan = make_plan(planted.firing_rate, planted.reader, served, CORPUS)
    with ChatClient(served.base_url, served.model, cache=tmp_path / "replies.db") as client:
        judge = ChatJudge(client)
        result = interpret_with(
            [SINGLE], planted.reader, plan, served, CORPUS, LogOddsExplainer(), judge
        )
        assert client.requests > 0
    row = result.scores.to_pylist()[0]
    assert row["coverage"] < 0.5
    assert row["n_failed"] == sum(
        t["pred"] is None and t["role"] == "own" for t in result.trials.to_pylist()
    )
    if row["coverage"] == 0:
        assert row["balanced_accuracy"] is row["lift"] is None


def test_a_model_the_server_does_not_have_is_an_error_of_the_user(served):
    with pytest.raises(UserError, match="nothing/here"):
        check_server(replace(served, model="nothing/here"))
