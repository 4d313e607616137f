"""Tokens in brackets: where an answer may be taken apart, and what only surrounds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from satune.tasks.maths.notation import FUNCTIONS, Token, dense
from satune.tasks.maths.terms import Unreadable
from satune.tasks.maths.units import CURRENCIES, ORDINALS, words

Tokens = Sequence[Token]

OPENING = {
    "(": ")", "[": "]", "{": "}", "\\{": "\\}", "langle": "rangle", "lfloor": "rfloor",
    "lceil": "rceil",
}  # fmt: skip
_DEEPEST = 40
_TEMPERATURES = ("C", "F")
_CLOSING = frozenset(OPENING.values())
_ROUGHLY = words("approximately about roughly around")


def is_sign(token: Token, *texts: str) -> bool:
    return token.kind in ("sign", "command") and token.text in texts


def depths(tokens: Tokens) -> Iterator[tuple[int, Token, int]]:
    """(index, token, depth), a bracket's own depth being that outside it."""
    depth = 0
    for i, token in enumerate(tokens):
        closes = token.kind == "end" or (
            token.kind in ("sign", "command") and token.text in _CLOSING
        )
        depth -= closes
        if not 0 <= depth <= _DEEPEST:
            raise Unreadable("a bracket closes that never opened, or there are too many")
        yield i, token, depth
        depth += token.kind == "begin" or (
            token.kind in ("sign", "command") and token.text in OPENING
        )
    if depth:
        raise Unreadable("a bracket never closes")


def split(tokens: Tokens, where: Callable[[Token], bool]) -> tuple[list[Tokens], list[str]]:
    """The pieces between the separators outside brackets, and the separators' texts."""
    pieces: list[Tokens] = []
    texts: list[str] = []
    start = 0
    for i, token, depth in depths(tokens):
        if depth == 0 and where(token):
            pieces.append(tokens[start:i])
            texts.append(token.text)
            start = i + 1
    pieces.append(tokens[start:])
    return pieces, texts


def whole_group(tokens: Tokens) -> bool:
    """Whether the first token is a bracket that the last one closes."""
    if len(tokens) < 2 or not (tokens[0].kind == "begin" or is_sign(tokens[0], *OPENING)):
        return False
    return all(depth > 0 for _, _, depth in list(depths(tokens))[1:-1])


def trimmed(tokens: Tokens) -> Tokens:
    """Without what only surrounds an answer: groups, emphasis, a leading = or \\approx, a point."""
    while tokens:
        first, last = tokens[0], tokens[-1]
        if is_sign(last, ".", ",", ";", ":", "\\") and not is_sign(last, "dots"):
            tokens = tokens[:-1]
        elif is_sign(first, "approx", "=", "sim", ":", "\\", "to") or (
            first.kind in ("word", "bare") and first.text.casefold() in _ROUGHLY
        ):
            tokens = tokens[1:]
        elif _announcement(tokens):
            tokens = tokens[_announcement(tokens) :]
        elif (len(tokens) > 2 and is_sign(first, "*") and is_sign(last, "*")) or (
            is_sign(first, "{") and is_sign(last, "}") and _balanced(tokens) and whole_group(tokens)
        ):
            tokens = tokens[1:-1]
        else:
            break
    return tokens


def _announcement(tokens: Tokens) -> int:
    """How many tokens say that the answer follows: "The final answer is"."""
    start = [token.text.casefold() for token in tokens[:4] if token.kind in ("word", "bare")]
    if "answer" not in start:
        return 0
    after = start.index("answer") + 1
    if not set(start[:after]) <= {"the", "final", "answer"} or after == len(tokens):
        return 0
    return after + (tokens[after].text.casefold() in ("is", ":"))


def _balanced(tokens: Tokens) -> bool:
    try:
        return bool(list(depths(tokens)))
    except Unreadable:
        return False


def without_ordinal(tokens: Tokens) -> Tokens:
    """Without the ^{th} of 5^{th}."""
    for length in (2, 4, 5):
        ending = dense(tokens[-length:]) if len(tokens) > length else ""
        if ending.startswith("^") and ending.strip("^{}").replace(" ", "") in ORDINALS:
            return tokens[:-length]
    return tokens


def without_currency(tokens: Tokens) -> tuple[Tokens, str]:
    """Without a currency's sign, and the currency ("" for none)."""
    for i in {0, 1, len(tokens) - 1} & set(range(len(tokens))):
        token = tokens[i]
        if token.kind == "sign" and token.text in CURRENCIES:
            if i == 1 and not is_sign(tokens[0], "-", "+"):
                continue
            return [*tokens[:i], *tokens[i + 1 :]], CURRENCIES[token.text]
    return tokens, ""


def without_sign_unit(tokens: Tokens) -> tuple[Tokens, str]:
    """Without a percent sign or a degree's circle at the end."""
    if len(tokens) > 1 and is_sign(tokens[-1], "%") and not any(t.kind == "letter" for t in tokens):
        return tokens[:-1], "percent"
    last = tokens[-1:] if tokens and tokens[-1].text in _TEMPERATURES else ()
    before = tokens[: len(tokens) - len(last)]
    for ending in ("^\\circ", "^{\\circ}", "\\circ"):
        length = {"^\\circ": 2, "^{\\circ}": 4, "\\circ": 1}[ending]
        if len(before) > length and dense(before[-length:]) == ending:
            functions = any(is_sign(token, *FUNCTIONS) for token in before)
            return (tokens, "") if functions else (before[:-length], "degree")
    return tokens, ""
