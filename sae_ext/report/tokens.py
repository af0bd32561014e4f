"""Tokens as a reader wants to see them: words joined again, odd bytes visible, all text escaped.

Understands WordPiece (`##ing` continues a word) and byte-level or SentencePiece vocabularies (`Ġ`
or `▁` begins one). Used by the report and by the dashboard alike.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

_WORD_STARTS = ("Ġ", "▁")
_VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍", "Ċ": "↵", "ĉ": "⇥"})
_NO_SPACE_BEFORE = frozenset(".,;:!?)]}%'’”")
_NO_SPACE_AFTER = frozenset("([{'’“@")


def display(tokens: Sequence[str]) -> list[str]:
    """Text of each token as shown; a leading space says that it begins a word.

    Args:
        tokens: the tokens of one window as the tokenizer spells them.
    """
    if any(token.startswith(_WORD_STARTS) for token in tokens):
        return [_marked(token) for token in tokens]
    shown: list[str] = []
    previous = ""
    for token in tokens:
        text = token[2:] if len(token) > 2 and token.startswith("##") else token
        glued = text is not token or not previous
        glued = glued or token[:1] in _NO_SPACE_BEFORE or previous[-1:] in _NO_SPACE_AFTER
        shown.append(("" if glued else " ") + (text.translate(_VISIBLE) or "∅"))
        previous = token
    return shown


def _marked(token: str) -> str:
    starts = token.startswith(_WORD_STARTS)
    text = (token[1:] if starts else token).translate(_VISIBLE).replace("Ġ", "·")
    return (" " if starts else "") + (text or ("·" if starts else "∅"))


def window_html(tokens: Sequence[str], activations: Sequence[float], scale: float) -> str:
    """One evidence window as HTML, each firing token on a background in proportion to its value.

    Args:
        tokens: [n] the window's tokens.
        activations: [n] the feature's activation on each.
        scale: the activation shown at full strength, as a rule the feature's largest anywhere.

    Returns:
        `<span>` elements; every character that came from the data is escaped.
    """
    parts = []
    for raw, shown, value in zip(tokens, display(tokens), activations, strict=True):
        space, text = (" ", shown[1:]) if shown.startswith(" ") else ("", shown)
        strength = min(1.0, value / scale) if value > 0 and scale > 0 else 0.0
        style = f' style="background:rgba(221,125,32,{0.85 * strength:.3f})"' if strength else ""
        tip = html.escape(f"{raw}  {value:.3g}", quote=True)
        parts.append(f'{space}<span title="{tip}"{style}>{html.escape(text)}</span>')
    return "".join(parts)
