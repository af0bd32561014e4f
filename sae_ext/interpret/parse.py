"""Reads what a language model replied, on the rule that a doubtful answer is no answer.

Three rungs, tried in turn: the reply is a JSON object; it contains one (after think blocks and
code fences are stripped, the last balanced object counts); it has lines such as "e7: yes". Values
that are not plainly yes or no, ids that were not asked and ids answered in two ways are dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NATIVE, SALVAGED, LINES, PARTIAL = "native", "salvaged", "lines", "partial"
REFUSED, EMPTY, TRUNCATED, FAILED = "refused", "empty", "truncated", "failed"

_THOUGHT = re.compile(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-z]*\n?", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\s*(i['’]?m sorry|i am sorry|sorry\b|i can['’]?t|i cannot|i won['’]?t|i am unable"
    r"|i['’]?m unable|as an ai)",
    re.IGNORECASE,
)
_LINE = re.compile(
    r"""^[\s>*\-"'`(\[{]*(?P<id>\w+)[\s"'`)\]*]*[:=\-–—][\s"'`*]*"""
    r"""(?P<value>yes|no|true|false|0|1)[\s"'`*.,;)\]}]*$""",
    re.IGNORECASE,
)
_WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_CONFLICT = object()


@dataclass(frozen=True)
class ParsedAnswers:
    """The answers that could be read, by id, and how they were come by.

    status is "native", "salvaged" or "lines" when every id has an answer, "partial" when some
    have, and "refused", "empty", "truncated" or "failed" when none has.
    """

    values: dict[str, bool]
    status: str


def parse_answers(
    content: str | None, ids: Sequence[str], finish_reason: str | None = None
) -> ParsedAnswers:
    """Yes/no answers by id.

    Args:
        content: the reply's text.
        ids: the ids that were asked; nothing else is accepted.
        finish_reason: the server's word on why the reply ended; "length" means it was cut.
    """
    if content is None or not content.strip():
        return ParsedAnswers({}, EMPTY)
    for rung, found in _objects(content):
        values = _validated(found, ids)
        if values:
            return ParsedAnswers(values, rung if len(values) == len(set(ids)) else PARTIAL)
    values = _from_lines(content, ids, finish_reason)
    if values:
        return ParsedAnswers(values, LINES if len(values) == len(set(ids)) else PARTIAL)
    return ParsedAnswers({}, _why_nothing(content, finish_reason))


def parse_object(
    content: str | None, required: str, finish_reason: str | None = None
) -> tuple[dict[str, Any] | None, str]:
    """An object that has the string field `required`, and the rung or reason."""
    if content is None or not content.strip():
        return None, EMPTY
    for rung, found in _objects(content):
        value = found.get(required)
        if isinstance(value, str) and value.strip():
            return {k: v for k, v in found.items() if v is not _CONFLICT}, rung
    return None, _why_nothing(content, finish_reason)


def _objects(content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object the reply is, or else the last one it contains."""
    whole = _loads(content)
    if isinstance(whole, dict):
        yield NATIVE, whole
        return
    last = None
    for span in _balanced(_spoken(content)):
        found = _loads(span)
        last = found if isinstance(found, dict) else last
    if last is not None:
        yield SALVAGED, last


def _spoken(content: str) -> str:
    """The reply without thoughts and fences; a thought that never ends swallows the rest."""
    return _FENCE.sub("", _THOUGHT.sub("", content))


def _balanced(text: str) -> Iterator[str]:
    """Outermost {...} spans, braces inside strings not counted."""
    start, depth, quoted, escaped = -1, 0, False, False
    for i, char in enumerate(text):
        if depth and quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif depth and char == '"':
            quoted = True
        elif char == "{":
            start, depth = (i if depth == 0 else start), depth + 1
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                yield text[start : i + 1]


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_conflicts)
    except (ValueError, RecursionError):
        return None


def _no_conflicts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which a key given twice with two values has neither."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        known = found.get(key, value)
        # 1 == True in Python, and both mean yes here; the comparison of types stays out of it.
        found[key] = value if known == value else _CONFLICT
    return found


def _validated(found: dict[str, Any], ids: Sequence[str]) -> dict[str, bool]:
    asked = {i.lower(): i for i in ids}
    if not any(key.strip().lower() in asked for key in found):
        inner = [value for value in found.values() if isinstance(value, dict)]
        if len(inner) != 1:
            return {}
        found = inner[0]
    return _unanimous((asked.get(key.strip().lower()), _truth(v)) for key, v in found.items())


def _from_lines(content: str, ids: Sequence[str], finish_reason: str | None) -> dict[str, bool]:
    asked = {i.lower(): i for i in ids}
    lines = _spoken(content).splitlines()
    if _is_cut(content, finish_reason):
        lines = lines[:-1]  # what looks like a 0 may have been the beginning of 0.9
    matches = (_LINE.match(line) for line in lines)
    return _unanimous(
        (asked.get(m["id"].lower()), _WORDS[m["value"].lower()]) for m in matches if m is not None
    )


def _unanimous(answers: Iterator[tuple[str | None, bool | None]]) -> dict[str, bool]:
    """The ids all of whose answers are plain and the same."""
    said: dict[str, set[bool | None]] = {}
    for known, value in answers:
        if known is not None:
            said.setdefault(known, set()).add(value)
    sole = {known: next(iter(values)) for known, values in said.items() if len(values) == 1}
    return {known: value for known, value in sole.items() if value is not None}


def _truth(value: Any) -> bool | None:
    """True or False when the value plainly says so."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return None


def _why_nothing(content: str, finish_reason: str | None) -> str:
    spoken = _spoken(content)
    if _REFUSAL.match(spoken):
        return REFUSED
    if not spoken.strip():
        return EMPTY if finish_reason != "length" else TRUNCATED
    return TRUNCATED if _is_cut(content, finish_reason) else FAILED


def _is_cut(content: str, finish_reason: str | None) -> bool:
    return finish_reason == "length" or content.count("{") > content.count("}")
