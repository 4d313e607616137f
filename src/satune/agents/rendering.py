"""What a seat sees, as the ids its model reads.

A conversation of many turns is rendered append-only: the next prompt is the previous prompt, the
completion exactly as it was sampled, and the ids of what came after. One conversation is then one
growing sequence, which a KV cache can follow and which training scores without rendering again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from satune.agents.messages import (
    MessageBuilder,
    TemplateSettings,
    Transcript,
    own_message,
    user_message,
)
from satune.thoughts import opened_by
from satune.types import Completion, Entry, EpisodeFailure, Ids, Message, Prompt, UserError, ids_of

# Characters of a text that may well come again: what stands around a message, a short answer.
_SHORT = 256
_HISTORIES = (("3+4",), ("a b", "c", "d"), ("1", "x y.", "22", "z", "3\n4", "w", "v"))
_REPLIES = (("7", "a: 8"), ("one\ntwo", "b"), ("12", "x\ny"))


def _is_plain(text: str) -> bool:
    """Templates may trim a message or look for tags in it; they leave a plain one as it is."""
    return bool(text) and "<" not in text and text == text.strip()


class ChatRenderer(MessageBuilder):
    """Renders for one agent: its tokenizer, its chat template, its context (types.Renderer).

    ``append_only`` tells whether the template passed the probe made here: what it writes after a
    seat's own message depends on nothing that came before. Then a turn costs the tokens of its new
    text only. Otherwise every prompt is rendered whole, compared with the one before it, and still
    extends that one's ids where the text does.

    Args:
        tokenizer: the agent's tokenizer.
        template: see TemplateSettings.
        context_limit: tokens that prompt and completion may have together.

    Raises:
        UserError: there is no chat template, or it cannot be rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateSettings,
        context_limit: int,
    ) -> None:
        if template.chat is None and not tokenizer.chat_template:
            raise UserError(
                f"template.chat: the tokenizer of {tokenizer.name_or_path or 'this agent'} has no "
                "chat template; give one as Jinja text"
            )
        super().__init__(template)
        self.tokenizer = tokenizer
        self.context_limit = context_limit
        self._short = lru_cache(maxsize=4096)(self._encode)
        self._recent = lru_cache(maxsize=64)(self._encode)
        self._special = {
            id: str(token)
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or id in tokenizer.all_special_ids
        }
        self._options: dict[str, Any] = {}
        if template.enable_thinking is not None:
            self._options["enable_thinking"] = template.enable_thinking
        if template.chat is not None:
            self._options["chat_template"] = template.chat
        try:
            self._head, self._tail = self._probe()
        except Exception as error:  # a template is a program, and anything may go wrong in it
            said = " ".join(str(error).split())
            raise UserError(
                f"template.chat: the chat template cannot be rendered ({said}); "
                "give one that takes alternating user and assistant messages"
            ) from error
        self.append_only = self._tail is not None

    def view(self, seat: str) -> ChatView:
        """A fresh view of one conversation for ``seat``."""
        return ChatView(self, seat)

    def encode(self, text: str) -> Ids:
        """The ids of ``text``. Only what can come again is held: short texts, and the last few
        long ones, since the samples of a problem begin with one prompt, one after another."""
        return self._short(text) if len(text) <= _SHORT else self._recent(text)

    def _encode(self, text: str) -> Ids:
        return ids_of(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def render(self, messages: Sequence[Message]) -> str:
        """The text of ``messages`` up to where the seat's next message begins."""
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **self._options
        )  # type: ignore[return-value]

    def _probe(self) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
        """What the template puts around a first user message, and around one that follows an own
        message; None where that depends on the rest of the conversation."""
        heads: set[tuple[str, ...] | None] = set()
        tails: set[tuple[str, ...] | None] = set()
        for content in ("7 eight", "3+4", "p\nq"):
            around = self.render([user_message(content)]).split(content)
            heads.add(tuple(around) if len(around) == 2 else None)
        for history in _HISTORIES:
            messages = [
                user_message(text) if at % 2 == 0 else own_message(text)
                for at, text in enumerate(history)
            ]
            prompt = self.render(messages)
            for own, reply in _REPLIES:
                whole = self.render([*messages, own_message(own), user_message(reply)])
                start = prompt + own
                around = whole[len(start) :].split(reply) if whole.startswith(start) else []
                tails.add(tuple(around) if len(around) == 2 else None)
        return _only(heads), _only(tails)

    def head(self, content: Any) -> str:
        """The text of a conversation that is one user message so far."""
        if self._head is not None and isinstance(content, str) and _is_plain(content):
            return self._head[0] + content + self._head[1]
        return self.render([user_message(content)])

    def tail(self, content: Any) -> str:
        """What follows a plain own message when a user message answers it (append_only)."""
        assert self._tail is not None
        if isinstance(content, str) and _is_plain(content):
            return self._tail[0] + content + self._tail[1]
        # The probe showed that nothing earlier matters, so the shortest history serves.
        short = [user_message("1")]
        start = self.render(short) + "2"
        return self.render([*short, own_message("2"), user_message(content)])[len(start) :]

    def suffix_ids(self, suffix: str, completion_ids: Ids) -> Ids:
        """The ids of what follows a completion, without the end token where that was sampled."""
        end = self._special.get(completion_ids[-1]) if completion_ids else None
        return self.encode(suffix.removeprefix(end) if end else suffix)


def _only(found: set[Any]) -> tuple[str, str] | None:
    return found.pop() if len(found) == 1 else None


class ChatView:
    """One seat's view of one conversation (types.View).

    ``prompt`` is given all entries so far, each time those of the last call and new ones behind
    them, then ``wrote`` the completion of that prompt.
    """

    def __init__(self, renderer: ChatRenderer, seat: str) -> None:
        self._renderer = renderer
        self._seat = seat
        self._transcript = Transcript()
        self._dropped: set[int] = set()
        self._messages: list[Message] = []
        self._text = ""
        self._opening = ""
        self._ids = ids_of()
        self._completion: Completion | None = None

    def wrote(self, completion: Completion) -> None:
        """Takes the completion of the last prompt, so that the next can extend it."""
        self._completion = completion

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt:
        """The prompt for the seat's next message.

        Where the context is full the oldest foreign messages are left out, in this prompt and the
        later ones; the problem, own messages and the newest foreign message stay.

        Args:
            entries: what the seat has seen, oldest first.
            max_new_tokens: tokens kept free for the completion.

        Raises:
            EpisodeFailure: the prompt does not fit the context even so.
        """
        new = self._transcript.extend(entries)
        if not self._extend(new):
            self._anew()
        while len(self._ids) + max_new_tokens > self._renderer.context_limit:
            self._drop_oldest(max_new_tokens)
        self._completion = None
        self._opening = opened_by(self._text)
        return Prompt(tuple(self._messages), self._ids, len(self._dropped), self._opening)

    def _extend(self, new: list[Entry]) -> bool:
        """Appends to the last prompt and its completion, if the template's text allows it."""
        renderer, completion = self._renderer, self._completion
        if completion is None or completion.ids is None or not new:
            return False
        own, rest = new[0], new[1:]
        written = self._opening + completion.text
        if own.kind != "own" or own.text != written or any(e.kind == "own" for e in rest):
            return False
        content = renderer.content(rest)
        messages = [*self._messages, own_message(own.text), user_message(content)]
        start = self._text + completion.text
        if renderer.append_only and _is_plain(own.text):
            suffix = renderer.tail(content)
        else:
            whole = renderer.render(messages)
            if not whole.startswith(start):
                return False
            suffix = whole[len(start) :]
        self._messages = messages
        self._text = start + suffix
        # A new array: the old one is in a prompt that was handed out.
        self._ids = self._ids + completion.ids + renderer.suffix_ids(suffix, completion.ids)
        return True

    def _anew(self) -> None:
        kept = [
            entry for at, entry in enumerate(self._transcript.entries) if at not in self._dropped
        ]
        self._messages = self._renderer.messages(kept)
        if len(self._messages) == 1:
            self._text = self._renderer.head(self._messages[0]["content"])
        else:
            self._text = self._renderer.render(self._messages)
        self._ids = self._renderer.encode(self._text)

    def _drop_oldest(self, max_new_tokens: int) -> None:
        foreign = [
            at for at, entry in enumerate(self._transcript.entries) if entry.kind == "foreign"
        ][:-1]
        left = [at for at in foreign if at not in self._dropped]
        if not left:
            raise EpisodeFailure(
                f"context: seat '{self._seat}': a prompt of {len(self._ids)} tokens and "
                f"{max_new_tokens} new ones (rollout.max_new_tokens) exceed the context of "
                f"{self._renderer.context_limit}; lower rollout.max_new_tokens or take an agent "
                "with a longer context",
                policy=True,
            )
        self._dropped.add(left[0])
        self._anew()
