"""Thoughts are no answers: the one place that tells what a message says from what was thought.

A thought stands between ``<think>`` and ``</think>``. One that never closes was cut (by the limit
on new tokens, mostly) and reaches to the end of the message. One that never opens was opened by
the prompt and reaches back to the message's start.

Standard library only; every function is linear in the text and raises nothing.
"""

from __future__ import annotations

OPENING = "<think>"
CLOSING = "</think>"


def answer_part(text: str) -> str | None:
    """What a message says outside its thoughts; None where a message with a thought says nothing.

    A message without thoughts is returned as it is, any other without outer space and the space
    that follows a thought. What was said before a thought counts, whether that one ends or not.
    """
    if OPENING not in text and CLOSING not in text:
        return text
    kept: list[str] = []
    at = 0
    while (start := text.find(OPENING, at)) >= 0 and (end := text.find(CLOSING, start)) >= 0:
        kept.append(text[at:start])
        at = end + len(CLOSING)
        while text[at : at + 1].isspace():
            at += 1
    kept.append(text[at:])
    # What is left holds closings without an opening before them, then at most one cut thought.
    said = "".join(kept).rpartition(CLOSING)[2].partition(OPENING)[0]
    return said.strip() or None


def is_cut(text: str) -> bool:
    """Whether the message ends inside a thought."""
    return text.rfind(OPENING) > text.rfind(CLOSING)


def without_thoughts(text: str) -> str:
    """``answer_part`` as others are shown it: an empty text where nothing was said."""
    return answer_part(text) or ""


def opened(text: str) -> str:
    """A message that went on from an opened thought, with that thought's beginning."""
    return text if text.lstrip().startswith(OPENING) else OPENING + text


def opened_by(prompt: str) -> str:
    r"""The thought that a rendered prompt ends with, say ``"<think>\n"``; empty if with none.

    What a model writes after such a prompt begins inside a thought: put this before it, and it
    reads like a message whose thought the model opened itself.
    """
    bare = prompt.rstrip()
    return prompt[len(bare) - len(OPENING) :] if bare.endswith(OPENING) else ""
