"""Tokenizers and chat templates of the tiny agents' two families.

Both are byte-level BPE over a fixed sample of the text this project writes, so that every agent of
a family has the same tokenizer whatever it was trained on, and any text survives a round trip. They
differ as the families they are named after do: how digits are grouped, which ids things have, and
how a chat is laid out.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MAX_LENGTH = 2048

_TEXT = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)

QWEN3_TEMPLATE = _TEXT + (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + text(message.content) + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

LLAMA_TEMPLATE = _TEXT + (
    "{{- '<|begin_of_text|>' -}}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{- text(message.content) + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif -%}"
)

_SENTENCES = (
    "guess the four distinct digits of the number: the answer is in the right place or in the "
    "wrong place",
    "read the problem, say what the others have found, then give your own answer to the team",
    "is this correct? check each step of the solution and continue with the next one",
    "Guess: the secret number. Answer: the final result is",
)

# A word's count is its rank among the merges; the words of the templates come first.
_QWEN3_SAMPLE = (
    ["user\n", "assistant\n", "system\n", "continue", ": "] * 100
    + [f"{count}{letter}" for count in range(5) for letter in "AB"] * 60
    + list(_SENTENCES) * 2
)
_LLAMA_SAMPLE = (
    ["user", "assistant", "system", "continue", "\n\n", ": "] * 100
    + [str(number) for number in range(10, 100)] * 60
    + list(_SENTENCES) * 2
)

# Words take a line end along (a role and its line end are one token); digits stand alone, but for
# a capital behind one, as in "1A2B".
_QWEN3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+\n?|\p{N}\p{Lu}?|[^\s\p{L}\p{N}]+ ?|\s+"
# Words keep to letters; up to two digits go together.
_LLAMA_WORDS = r" ?\p{L}+|\p{N}{1,2}|[^\s\p{L}\p{N}]+ ?|[\r\n]+|\s+"


def _byte_pairs(words: str, sample: list[str], size: int, first: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=first,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML (``<|im_start|>``, ``<|im_end|>``), digits one by one, special tokens last."""
    tokenizer = _byte_pairs(_QWEN3_WORDS, _QWEN3_SAMPLE, 381, [])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN3_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Headers (``<|start_header_id|>``, ``<|eot_id|>``), two digits a token, special tokens
    first."""
    first = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = _byte_pairs(_LLAMA_WORDS, _LLAMA_SAMPLE, 448, [*first, "<|eot_id|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        chat_template=LLAMA_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
