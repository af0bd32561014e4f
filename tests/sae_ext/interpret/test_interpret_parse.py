from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ext.interpret.parse import parse_answers, parse_object

IDS = ["e1", "e2", "e3"]
FULL = {"e1": True, "e2": False, "e3": True}


@pytest.mark.parametrize(
    ("reply", "values", "status"),
    [
        ('{"e1": true, "e2": false, "e3": true}', FULL, "native"),
        (' {"E1": "yes", "e2": "No", "e3": 1}\n', FULL, "native"),
        ('{"answers": {"e1": true, "e2": false, "e3": true}}', FULL, "native"),
        ('```json\n{"e1": true, "e2": false, "e3": true}\n```', FULL, "salvaged"),
        ('Sure! {"e1": true, "e2": false, "e3": true} Hope it helps.', FULL, "salvaged"),
        ('[0, 1] means nothing. {"e1": true, "e2": false, "e3": true}', FULL, "salvaged"),
        (
            '<think>{"e1": false, "e2": true, "e3": false}?</think>'
            '{"e1": true, "e2": false, "e3": true}',
            FULL,
            "salvaged",
        ),
        (
            'First {"e1": false, "e2": true, "e3": false}, no: '
            '{"e1": true, "e2": false, "e3": true}',
            FULL,
            "salvaged",
        ),
        ("e1: yes\ne2: no\ne3: yes", FULL, "lines"),
        ("- **e1**: Yes.\n- **e2**: No.\n- **e3**: TRUE", FULL, "lines"),
        ("e1 = 1\ne2 = 0\ne3 = 1", FULL, "lines"),
        ('{"e1": true, "e3": true}', {"e1": True, "e3": True}, "partial"),
        ('{"e1": true, "e2": false, "e3": true, "e9": true}', FULL, "native"),
        ('{"e1": true, "e2": 2, "e3": true}', {"e1": True, "e3": True}, "partial"),
        ('{"e1": true, "e2": 0.5, "e3": null}', {"e1": True}, "partial"),
        ('{"e1": true, "e1": false, "e2": false}', {"e2": False}, "partial"),
        ('{"e1": true, "E1": false, "e2": false}', {"e2": False}, "partial"),
        ("e1: yes\ne1: no\ne2: no", {"e2": False}, "partial"),
        ('{\n"e1": true,\n"e2": false,\n"e3": tr', {"e1": True, "e2": False}, "partial"),
        ('{\n"e1": 1,\n"e2": 0', {"e1": True}, "partial"),
        ("[1, 0, 1]", {}, "failed"),
        ("[true, false]", {}, "failed"),
        ("1, 0, 1", {}, "failed"),
        ("Passages [1] and [3] fire.", {}, "failed"),
        ('{"a": true, "b": false}', {}, "failed"),
        ('{"e1": "maybe"}', {}, "failed"),
        ("", {}, "empty"),
        (" \n", {}, "empty"),
        (None, {}, "empty"),
        ("I'm sorry, but I can't help with that.", {}, "refused"),
        ("<think>e1: yes\ne2: no", {}, "empty"),
        ('{"e1": tr', {}, "truncated"),
        ("\x00\ufffd%%{{}}", {}, "failed"),
        ("Is e1: yes or no?", {}, "failed"),
    ],
)
def test_a_reply_gives_its_plain_answers_and_no_others(reply, values, status):
    parsed = parse_answers(reply, IDS)
    assert parsed.values == values
    assert parsed.status == status


def test_a_reply_cut_by_the_server_is_called_truncated():
    assert parse_answers("<think>so", IDS, "length").status == "truncated"
    assert parse_answers("Well, the passages", IDS, "length").status == "truncated"


def test_the_last_line_of_a_cut_reply_is_not_trusted():
    assert parse_answers("e1: yes\ne2: 0", IDS, "length").values == {"e1": True}
    assert parse_answers("e1: yes\ne2: 0", IDS, "stop").values == {"e1": True, "e2": False}


@given(st.text(max_size=300))
def test_any_text_is_survived_and_only_asked_ids_come_back(text):
    parsed = parse_answers(text, IDS)
    assert set(parsed.values) <= set(IDS)
    assert all(isinstance(value, bool) for value in parsed.values.values())
    full = parsed.status in ("native", "salvaged", "lines")
    assert full == (set(parsed.values) == set(IDS))


@given(
    truth=st.dictionaries(
        st.sampled_from([f"e{i}" for i in range(1, 20)]), st.booleans(), min_size=1
    ),
    before=st.text("abc {}[]\"'\n", max_size=30),
    cut=st.integers(0, 400),
    indent=st.sampled_from([None, 1]),
)
def test_no_damage_to_a_good_reply_turns_an_answer_round(truth, before, cut, indent):
    reply = before + json.dumps(truth, indent=indent)
    for text in (reply, reply[:cut]):
        values = parse_answers(text, list(truth)).values
        assert all(truth[example] == value for example, value in values.items())


@pytest.mark.parametrize(
    ("reply", "text", "status"),
    [
        ('{"explanation": "the word cat", "kind": "token"}', "the word cat", "native"),
        ('<think>{"explanation": "dog"}</think>\n{"explanation": "cat"}', "cat", "salvaged"),
        ('```\n{"explanation": "a {brace}"}\n```', "a {brace}", "salvaged"),
        ('{"explanation": "a \\"quoted } brace\\""} ok', 'a "quoted } brace"', "salvaged"),
        ('{"explanation": ""}', None, "failed"),
        ('{"explanation": ["cat"]}', None, "failed"),
        ("The word cat.", None, "failed"),
        ('{"explanation": "the wo', None, "truncated"),
        ("I cannot do this.", None, "refused"),
        (None, None, "empty"),
    ],
)
def test_an_explanation_is_read_from_an_object_only(reply, text, status):
    found, how = parse_object(reply, "explanation")
    assert (found or {}).get("explanation") == text
    assert how == status
