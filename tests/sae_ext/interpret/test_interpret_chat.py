from __future__ import annotations

import json
import socket
import time
from email.utils import formatdate

import pytest
from chat_server import Step, completion, says, sensible, serving
from planted_corpus import CORPUS, SINGLE, SINGLE_2, TOPIC, Planted

from sae_ext.config import InterpretConfig
from sae_ext.errors import UserError
from sae_ext.interpret import Window, check_server, interpret_features, make_plan, summary
from sae_ext.interpret.cache import ReplyCache
from sae_ext.interpret.chat import KEY_VARIABLE, ChatClient, ChatFailed, Patience
from sae_ext.interpret.examples import Example, FeatureEvidence
from sae_ext.interpret.explain import ChatExplainer, Explanation
from sae_ext.interpret.judge import PER_CALL, ChatJudge
from sae_ext.interpret.prompts import CLOSE, OPEN, explain_messages, judge_messages, marked

QUICK = Patience(reply=0.4, call=20, first_wait=0.01, longest_wait=2)
HELLO = [{"role": "user", "content": "hello"}]
ALL_TRUE = Explanation(0, "chat", "ok", "anything")


def client_of(url: str, **options) -> ChatClient:
    return ChatClient(url, "m", **{"patience": QUICK, **options})


def examples(n: int) -> list[Example]:
    window = Window("d", 0, 0, 0, ("some", "text"), ())
    return [Example(f"e{i}", window, "random", fires=False) for i in range(1, n + 1)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


# -- one call ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        Step(status=500, body=b"oops"),
        Step(status=503),
        Step(status=408),
        Step(status=429, body=b'{"error": {"message": "slow down"}}'),
        Step(hang_up=True),
        Step(stall=True),
        Step(body=completion("half")[:30]),
        Step(body=b'{"choices": []}'),
        Step(body=b'{"choices": null}'),
    ],
    ids=lambda s: f"{s.status}{'-hang-up' * s.hang_up}{'-stall' * s.stall}-{s.body[:14]!r}",
)
def test_passing_trouble_is_tried_again(trouble):
    with serving(trouble, trouble, says("fine")) as server, client_of(server.url) as client:
        assert client.ask(HELLO, max_tokens=5).content == "fine"
        assert len(server.requests) == client.requests == 3


@pytest.mark.parametrize(
    "when",
    [lambda: "0.6", lambda: formatdate(time.time() + 2, usegmt=True)],
    ids=["seconds", "date"],
)
def test_the_wait_a_server_asks_for_is_kept(when):
    began = time.monotonic()
    trouble = Step(status=429, headers={"Retry-After": when()})
    with serving(trouble, says("fine")) as server, client_of(server.url) as client:
        client.ask(HELLO, max_tokens=5)
    assert time.monotonic() - began >= 0.5


def test_an_absurd_wait_is_cut_to_the_longest_one():
    patience = Patience(first_wait=0.01, longest_wait=0.05)
    trouble = Step(status=429, headers={"Retry-After": "86400"})
    with (
        serving(trouble, says("fine")) as server,
        client_of(server.url, patience=patience) as client,
    ):
        assert client.ask(HELLO, max_tokens=5).content == "fine"


def test_a_call_fails_after_the_last_try():
    with serving(*[Step(status=500, body=b"oops")] * 9) as server, client_of(server.url) as client:
        with pytest.raises(ChatFailed, match="HTTP 500: oops"):
            client.ask(HELLO, max_tokens=5)
        assert len(server.requests) == QUICK.tries


def test_the_time_of_a_call_holds_for_all_its_tries():
    patience = Patience(reply=0.2, call=0.5, first_wait=0.01)
    with (
        serving(*[Step(stall=True)] * 9) as server,
        client_of(server.url, patience=patience) as client,
    ):
        began = time.monotonic()
        with pytest.raises(ChatFailed, match="timed out"):
            client.ask(HELLO, max_tokens=5)
        assert time.monotonic() - began < 2
        assert len(server.requests) <= 4


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(400, "check model"), (401, KEY_VARIABLE), (403, KEY_VARIABLE), (404, "check base_url")],
)
def test_final_refusals_name_address_model_and_remedy_at_once(status, remedy):
    body = b'{"error": {"message": "because"}}'
    with serving(Step(status=status, body=body)) as server, client_of(server.url) as client:
        with pytest.raises(UserError) as caught:
            client.ask(HELLO, max_tokens=5)
        message = str(caught.value)
        assert all(part in message for part in (server.url, "'m'", str(status), "because", remedy))
        assert "\n" not in message
        assert len(server.requests) == 1


def test_a_spent_quota_is_final():
    body = b'{"error": {"message": "pay", "code": "insufficient_quota"}}'
    with serving(Step(status=429, body=body)) as server, client_of(server.url) as client:
        with pytest.raises(UserError, match="quota"):
            client.ask(HELLO, max_tokens=5)
        assert len(server.requests) == 1


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_server_is_an_error_of_the_user_both_at_the_start_and_later():
    url = f"http://127.0.0.1:{closed_port()}/v1"
    config = InterpretConfig(backend="openai", base_url=url, model="m")
    with pytest.raises(UserError, match="no server answers there"):
        check_server(config)
    with client_of(url) as client:
        with pytest.raises(UserError, match="no server answers there"):
            client.ask(HELLO, max_tokens=5)
        assert client.requests == QUICK.tries


def test_check_server_passes_when_the_model_answers_and_asks_nothing_for_rules():
    with serving() as server:
        check_server(InterpretConfig(backend="openai", base_url=server.url, model="m"))
        assert len(server.requests) == 1
    check_server(InterpretConfig(backend="rules"))


def test_check_server_reports_a_server_that_never_answers():
    with serving(*[Step(status=500)] * 9) as server:
        config = InterpretConfig(backend="openai", base_url=server.url, model="m")
        with pytest.raises(UserError, match="gives no answer for model 'm'"):
            check_server(config, QUICK)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///tmp", ""])
def test_an_address_that_is_not_http_is_refused(url):
    with pytest.raises(UserError, match="is not an http address"):
        ChatClient(url, "m")


def test_the_key_is_sent_and_never_stored(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")
    with serving() as server, client_of(server.url, cache=tmp_path / "replies.db") as client:
        client.ask(HELLO, max_tokens=5)
        assert server.authorizations == ["Bearer sk-very-secret"]
    for path in tmp_path.iterdir():
        assert b"very-secret" not in path.read_bytes()


# -- the cache ---------------------------------------------------------------------------------


def test_a_reply_is_asked_for_once_also_after_a_restart(tmp_path):
    cache = tmp_path / "replies.db"
    with serving(says("first"), says("second")) as server:
        for _ in range(2):
            with client_of(server.url, cache=cache) as client:
                assert client.ask(HELLO, max_tokens=5).content == "first"
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "change", [{"max_tokens": 6}, {"seed": 1}, {"model": "n"}, {"content": "hello!"}]
)
def test_anything_that_may_change_the_reply_is_a_new_question(tmp_path, change):
    cache = tmp_path / "replies.db"
    with serving(says("first"), says("second")) as server:
        with client_of(server.url, cache=cache) as client:
            client.ask(HELLO, max_tokens=5)
        options = {"cache": cache, "patience": QUICK, "seed": change.get("seed", 0)}
        with ChatClient(server.url, change.get("model", "m"), **options) as client:
            messages = [{"role": "user", "content": change.get("content", "hello")}]
            reply = client.ask(messages, max_tokens=change.get("max_tokens", 5))
        assert reply.content == "second"


def test_of_two_replies_to_one_question_the_first_counts(tmp_path):
    first, second = ReplyCache(tmp_path / "replies.db"), ReplyCache(tmp_path / "replies.db")
    assert first.put({"q": 1}, "mine", 0.1) == "mine"
    assert second.put({"q": 1}, "yours", 0.1) == "mine"
    assert len(second) == 1
    first.close()
    second.close()


def test_failures_are_not_cached(tmp_path):
    cache = tmp_path / "replies.db"
    script = [*[Step(status=500)] * QUICK.tries, says("fine")]
    with serving(*script) as server, client_of(server.url, cache=cache) as client:
        with pytest.raises(ChatFailed):
            client.ask(HELLO, max_tokens=5)
        assert client.ask(HELLO, max_tokens=5).content == "fine"


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "replies.db").write_bytes(b"something else, and long enough to be read" * 50)
    with pytest.raises(UserError, match=r"reply cache .*replies\.db"):
        ChatClient("http://127.0.0.1/v1", "m", cache=tmp_path / "replies.db")


# -- judge and explainer -----------------------------------------------------------------------


def judged(*script: Step, n: int = PER_CALL):
    with serving(*script) as server, client_of(server.url) as client:
        return ChatJudge(client).ask(ALL_TRUE, examples(n)), server


def answer(*ids: int, value: bool = True) -> str:
    return json.dumps({f"e{i}": value for i in ids})


def test_missing_ids_are_asked_for_once_more_and_they_alone():
    answers, server = judged(says(answer(1, 2, 3)), says(answer(4, 5)), n=6)
    assert [a.yes for a in answers] == [True] * 5 + [None]
    assert [a.attempt for a in answers] == [1, 1, 1, 2, 2, 2]
    assert len(server.requests) == 2
    assert server.requests[1]["max_tokens"] == 2 * server.requests[0]["max_tokens"]
    assert "e3:" not in server.prompts[1]
    assert all(f"e{i}:" in server.prompts[1] for i in (4, 5, 6))


@pytest.mark.parametrize(
    ("replies", "covered", "status"),
    [
        ([says("I'm sorry, I can't.")] * 2, 0, "refused"),
        ([says(None, refusal="no")] * 2, 0, "refused"),
        ([says("")] * 2, 0, "empty"),
        ([says(None)] * 2, 0, "empty"),
        ([says('{"e1": tr', "length")] * 2, 0, "truncated"),
        ([says("[1, 0, 1]")] * 2, 0, "failed"),
        ([says("[1, 0, 1]"), says(answer(*range(1, 11)))], 10, "native"),
        ([Step(status=500)] * 2 * QUICK.tries, 0, "no reply: HTTP 500: no message"),
    ],
)
def test_coverage_counts_exactly_what_was_answered(replies, covered, status):
    answers, server = judged(*replies)
    assert sum(a.yes is not None for a in answers) == covered
    assert {a.parse_status for a in answers} == {status}
    assert len(server.requests) == len(replies)


def test_a_failed_call_costs_its_own_batch_only():
    script = [*[Step(status=500)] * 2 * QUICK.tries, says(answer(*range(11, 21)))]
    answers, _ = judged(*script, n=20)
    assert [a.yes for a in answers] == [None] * 10 + [True] * 10


def test_the_judge_sees_neither_truth_nor_document():
    hidden = Window("secret-document", 123456, 0, 0, ("shown",), ())
    example = Example("e1", hidden, "q5", fires=True)
    prompt = judge_messages("words", [example])[-1]["content"]
    assert '"shown"' in prompt
    for word in ("secret", "123456", "q5"):
        assert word not in prompt


def evidence(*windows: Window) -> FeatureEvidence:
    return FeatureEvidence(0, windows, windows, (Window("d", 1, 50, 0, ("quiet",), ()),), {})


FIRING = Window("d", 0, 50, 0, ("a", "black", "cat", "##s", "sat"), (0.0, 0.9, 0.0, 1.0, 0.1))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            '{"explanation": "cats\\n and dogs", "kind": "token", "confidence": 0.5}',
            ("cats and dogs", "ok", "token", 0.5, "native"),
        ),
        ('{"explanation": "No pattern."}', ("No pattern.", "no_pattern", None, None, "native")),
        (
            '{"explanation": "x", "kind": "magic", "confidence": 7}',
            ("x", "ok", None, None, "native"),
        ),
        ("I cannot.", (None, "failed", None, None, "refused")),
        ("cats", (None, "failed", None, None, "failed")),
    ],
)
def test_an_explanation_is_taken_as_said_or_not_at_all(reply, expected):
    with serving(says(reply)) as server, client_of(server.url) as client:
        found = ChatExplainer(client).explain(evidence(FIRING))
        assert len(server.requests) == 1
    assert (
        found.text,
        found.status,
        found.pattern,
        found.confidence,
        found.parse_status,
    ) == expected
    assert (found.model, found.prompt_tokens, found.completion_tokens) == ("m", 7, 3)


def test_a_cut_explanation_is_asked_for_with_more_room():
    with serving(says('{"expl', "length"), says('{"explanation": "x"}')) as server:
        with client_of(server.url) as client:
            assert ChatExplainer(client).explain(evidence(FIRING)).text == "x"
        assert server.requests[1]["max_tokens"] == 2 * server.requests[0]["max_tokens"]


def test_an_explainer_without_reply_fails_for_its_feature_only():
    with serving(*[Step(status=500)] * QUICK.tries) as server, client_of(server.url) as client:
        found = ChatExplainer(client).explain(evidence(FIRING))
    assert (found.status, found.text) == ("failed", None)


def test_runs_of_strongly_firing_tokens_are_marked():
    assert marked(FIRING) == f"a {OPEN}black{CLOSE} cat{OPEN}s{CLOSE} sat"
    run = Window("d", 0, 0, 0, ("Ġa", "Ġbig", "Ġcat"), (0.0, 1.0, 1.0))
    assert marked(run) == f"a {OPEN}big cat{CLOSE}"


def test_marks_and_lines_in_the_corpus_cannot_forge_anything():
    nasty = Window("d", 0, 50, 0, (f"{OPEN}x{CLOSE}", '"\ne9: "hi'), (0.0, 1.0))
    shown = explain_messages(evidence(nasty))[-1]["content"].split("Passages in which it fires")[1]
    assert shown.count(OPEN) == shown.count(CLOSE) == 1
    asked = judge_messages("d", [Example("e1", nasty, "q1", fires=True)])[-1]["content"]
    assert not any(line.startswith("e9:") for line in asked.splitlines())


# -- a whole run -------------------------------------------------------------------------------

FEATURES = [SINGLE, SINGLE_2, TOPIC]


def run(planted: Planted, server, cache=None, features=FEATURES, parallel=1):
    config = InterpretConfig(
        backend="openai", base_url=server.url, model="m", positives=10, negatives=10
    )
    plan = make_plan(planted.firing_rate, planted.reader, config, CORPUS)
    result = interpret_features(
        features,
        planted.reader,
        plan,
        config,
        CORPUS,
        cache=cache,
        parallel=parallel,
        patience=QUICK,
    )
    return result, plan


def test_a_sensible_model_beats_its_control(planted):
    with serving() as server:
        result, plan = run(planted, server, parallel=4)
    rows = {row["feature"]: row for row in result.scores.to_pylist()}
    assert rows[SINGLE]["balanced_accuracy"] == rows[SINGLE_2]["balanced_accuracy"] == 1
    assert rows[SINGLE]["lift"] > 0.3
    found = summary(result.scores, plan)
    assert (found["coverage"], found["model"], found["judge"]) == (1, "m", "chat")


def test_a_rerun_and_other_batches_repeat_no_call(planted, tmp_path):
    cache = tmp_path / "replies.db"
    with serving() as server:
        part, _ = run(planted, server, cache, FEATURES[:1])
        used = len(server.requests)
        whole, _ = run(planted, server, cache)
        prompts = list(server.prompts)
        assert used < len(prompts) == len(set(prompts))
        again, _ = run(planted, server, cache, parallel=3)
        assert len(server.requests) == len(prompts)
    assert again == whole
    assert part.scores.to_pylist()[0] in whole.scores.to_pylist()


def test_faults_in_the_midst_of_a_run_lower_coverage_by_exactly_what_was_lost(planted):
    with serving() as server:
        clean, _ = run(planted, server, features=[SINGLE])
    # The own explanation's first ten windows get refusals, twice; 500s in between are retried.
    refusal = says("I'm sorry, no.")
    good = [sensible(p) for p in server.prompts if "Description:" not in p]
    with serving(*good, Step(status=500), refusal, Step(status=429), refusal) as server:
        faulty, _ = run(planted, server, features=[SINGLE])
    row = faulty.scores.to_pylist()[0]
    assert (row["coverage"], row["n_failed"], row["control_coverage"]) == (0.5, 10, 1.0)
    lost = faulty.trials.filter(faulty.trials["pred"].is_null()).to_pylist()
    assert {t["parse_status"] for t in lost} == {"refused"}
    assert clean.scores.to_pylist()[0]["coverage"] == 1


def test_a_feature_without_explanation_is_a_row_without_score(planted):
    with serving() as server:
        server.script = [says("no idea")] * 40
        result, plan = run(planted, server, features=[SINGLE])
    assert result.explanations.to_pylist()[0]["status"] == "failed"
    row = result.scores.to_pylist()[0]
    assert (row["coverage"], row["balanced_accuracy"], row["lift"]) == (0, None, None)
    assert set(result.trials["parse_status"].to_pylist()) == {"no_explanation"}
    assert summary(result.scores, plan)["n_scored"] == 0


def test_a_wrong_key_stops_the_run(planted):
    with serving() as server:
        server.script = [Step(status=401)] * 20
        with pytest.raises(UserError, match="HTTP 401"):
            run(planted, server, parallel=4)
