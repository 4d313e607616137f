from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satune.agents.messages import (
    CONTINUE,
    TemplateSettings,
    without_thoughts,
)
from satune.agents.rendering import ChatRenderer
from satune.tiny.zoo import tiny_tokenizer
from satune.types import Completion, Entry, EpisodeFailure, UserError, ids_of, text_part

FAMILIES = ("tiny:qwen3-s", "tiny:llama-s")
TOKENIZERS = {spec: tiny_tokenizer(spec) for spec in FAMILIES}
RENDERERS = {
    spec: ChatRenderer(tokenizer, TemplateSettings(), 2048)
    for spec, tokenizer in TOKENIZERS.items()
}

# What thinking templates do: a finished message loses its thoughts.
FORGETFUL = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}<think></think>{%- endif -%}"
    "{%- endif -%}"
)
# The tail depends on how long the conversation is.
COUNTING = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + loop.index | string + '\n' + m.content + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{{ '<|im_start|>assistant' + (messages | length + 1) | string + '\n' }}"
)


def problem(text):
    return Entry("problem", parts=(text_part(text),))


def own(text, seat="b"):
    return Entry("own", text, seat)


def foreign(text, seat="a"):
    return Entry("foreign", text, seat)


def completion(renderer, text, end=True):
    eos = [renderer.tokenizer.eos_token_id] if end else []
    ids = renderer.encode(text) + ids_of(eos)
    return Completion(text, "stop" if end else "length", 0, ids)


def renderer_with(template, limit=2048, spec=FAMILIES[0]):
    return ChatRenderer(TOKENIZERS[spec], template, limit)


def test_golden_chatml():
    renderer = RENDERERS["tiny:qwen3-s"]
    view = renderer.view("b")
    seen = [problem("3+4-2"), foreign("7-2")]
    first = view.prompt(seen, 8)
    assert renderer.tokenizer.decode(first.ids) == (
        "<|im_start|>user\n3+4-2\na: 7-2<|im_end|>\n<|im_start|>assistant\n"
    )
    view.wrote(completion(renderer, "5"))
    seen += [own("5"), foreign("6", "c"), Entry("observation", "1A2B"), Entry("instruction", "go")]
    second = view.prompt(seen, 8)
    assert renderer.tokenizer.decode(second.ids) == (
        "<|im_start|>user\n3+4-2\na: 7-2<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\nc: 6\n1A2B\ngo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    # <|im_start|>, "user\n", 3 + 4 - 2, "\n", a, ": ", 7 - 2, <|im_end|>, "\n", <|im_start|>,
    # "assistant\n"
    assert len(first.ids) == 2 + 5 + 3 + 3 + 4


def test_golden_llama_headers():
    renderer = RENDERERS["tiny:llama-s"]
    view = renderer.view("b")
    seen = [problem("3+4-2"), foreign("17-2")]
    first = view.prompt(seen, 8)
    head = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n3+4-2\na: 17-2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert renderer.tokenizer.decode(first.ids) == head
    view.wrote(completion(renderer, "5"))
    second = view.prompt([*seen, own("5"), foreign("6", "c")], 8)
    assert renderer.tokenizer.decode(second.ids) == head + (
        "5<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nc: 6<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    # begin, header user end "\n\n", 3 + 4 - 2, "\n", a, ": ", 17 - 2, eot, header assistant end
    # "\n\n"
    assert len(first.ids) == 1 + 4 + 5 + 3 + 3 + 1 + 4


def test_names_and_thoughts_of_others():
    quiet = replace(TemplateSettings(), names=False)
    entries = [problem("p"), foreign("<think>hm</think>\n7")]
    assert renderer_with(quiet).view("b").prompt(entries, 1).messages[0]["content"] == "p\n7"
    loud = replace(TemplateSettings(), show_thoughts=True)
    shown = renderer_with(loud).view("b").prompt(entries, 1).messages[0]["content"]
    assert shown == "p\na: <think>hm</think>\n7"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("7 - 2", "7 - 2"),
        ("so <think>x</think> 7", "so 7"),
        ("7 <think>cut off", "7"),
        ("opened by the template</think>\n7", "7"),
        ("<think>a</think>1<think>b</think>2", "12"),
        ("<think></think>", ""),
    ],
)
def test_without_thoughts(text, left):
    assert without_thoughts(text) == left


def test_two_own_messages_in_a_row_are_told_to_continue():
    renderer = RENDERERS["tiny:qwen3-s"]
    view = renderer.view("b")
    first = view.prompt([problem("p")], 4)
    view.wrote(completion(renderer, "x"))
    second = view.prompt([problem("p"), own("x")], 4)
    assert [m["content"] for m in second.messages] == ["p", "x", CONTINUE]
    assert second.ids[: len(first.ids)] == first.ids
    fresh = renderer.view("b").prompt([problem("p"), own("x"), own("y"), foreign("z")], 4)
    assert [m["content"] for m in fresh.messages] == ["p", "x", CONTINUE, "y", "a: z"]


def test_own_message_comes_before_those_of_the_same_moment():
    renderer = RENDERERS["tiny:llama-s"]
    view = renderer.view("b")
    view.prompt([problem("p")], 4)
    wrote = completion(renderer, "x")
    view.wrote(wrote)
    prompt = view.prompt([problem("p"), foreign("z"), own("x"), foreign("w", "c")], 4)
    assert [m["content"] for m in prompt.messages] == ["p", "x", "a: z\nc: w"]


def test_a_message_cut_by_the_limit_gets_its_end_token_and_a_sampled_one_no_second():
    renderer = RENDERERS["tiny:qwen3-s"]
    eos = renderer.tokenizer.eos_token_id
    prompts = []
    for end in (True, False):
        view = renderer.view("b")
        view.prompt([problem("p")], 4)
        view.wrote(completion(renderer, "x", end))
        prompts.append(view.prompt([problem("p"), own("x"), foreign("z")], 4).ids)
    assert prompts[0] == prompts[1]
    # The user's, the own message's, the user's.
    assert prompts[0].count(eos) == 3


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.text("0123456789+-AB ab", min_size=1, max_size=8)
ROUNDS = st.lists(
    st.tuples(
        TEXTS | PLAIN,
        st.booleans(),
        st.lists(
            st.tuples(st.sampled_from(["foreign", "observation", "instruction"]), TEXTS | PLAIN),
            max_size=3,
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150)
@given(spec=st.sampled_from(FAMILIES), start=TEXTS, rounds=ROUNDS)
def test_one_conversation_is_one_growing_sequence(spec, start, rounds):
    renderer = RENDERERS[spec]
    assert renderer.append_only
    view, seen = renderer.view("b"), [problem(start)]
    prompt = view.prompt(seen, 1)
    assert prompt.ids == renderer.encode(renderer.render(prompt.messages))
    for text, end, others in rounds:
        wrote = completion(renderer, text, end)
        view.wrote(wrote)
        seen += [own(text), *(Entry(kind, said, "a") for kind, said in others)]
        grown = view.prompt(seen, 1)
        assert grown.ids[: len(prompt.ids) + len(wrote.ids)] == prompt.ids + wrote.ids
        assert renderer.tokenizer.decode(grown.ids) == renderer.render(grown.messages)
        assert [m["role"] for m in grown.messages[::2]] == ["user"] * (len(grown.messages) // 2 + 1)
        assert grown.messages == tuple(renderer.messages(seen))
        prompt = grown


def test_completions_are_kept_as_sampled_even_where_the_text_has_other_ids():
    renderer = RENDERERS["tiny:qwen3-s"]
    view = renderer.view("b")
    first = view.prompt([problem("p")], 4)
    # "continue" spelt in bytes, which the tokenizer would never write.
    spelt = ids_of(renderer.tokenizer.convert_tokens_to_ids(list("continue")))
    assert renderer.encode("continue") != spelt
    view.wrote(Completion("continue", "length", 0, spelt))
    second = view.prompt([problem("p"), own("continue"), foreign("z")], 4)
    assert second.ids[len(first.ids) :][: len(spelt)] == spelt


def test_a_template_that_forgets_thoughts_is_rendered_anew_for_them():
    renderer = renderer_with(TemplateSettings(chat=FORGETFUL))
    assert renderer.append_only
    view = renderer.view("b")
    first = view.prompt([problem("p")], 9)
    view.wrote(completion(renderer, "<think>hm</think>7"))
    second = view.prompt([problem("p"), own("<think>hm</think>7"), foreign("z")], 9)
    text = renderer.tokenizer.decode(second.ids)
    assert text == renderer.render(second.messages)
    assert "hm" not in text
    assert second.ids[: len(first.ids)] == first.ids
    view.wrote(completion(renderer, "8"))
    third = view.prompt(
        [problem("p"), own("<think>hm</think>7"), foreign("z"), own("8"), foreign("y")], 9
    )
    assert third.ids[: len(second.ids)] == second.ids


def test_a_template_whose_prompt_is_not_kept_is_not_append_only():
    renderer = renderer_with(TemplateSettings(chat=FORGETFUL, enable_thinking=False))
    assert not renderer.append_only
    view = renderer.view("b")
    view.prompt([problem("p")], 9)
    view.wrote(completion(renderer, "7"))
    second = view.prompt([problem("p"), own("7"), foreign("z")], 9)
    assert renderer.tokenizer.decode(second.ids) == renderer.render(second.messages)


def test_a_template_with_a_changing_tail_still_extends_where_the_text_does():
    renderer = renderer_with(TemplateSettings(chat=COUNTING))
    assert not renderer.append_only
    view = renderer.view("b")
    first = view.prompt([problem("p")], 9)
    wrote = completion(renderer, "continue")
    view.wrote(wrote)
    second = view.prompt([problem("p"), own("continue"), foreign("z")], 9)
    assert second.ids[: len(first.ids) + len(wrote.ids)] == first.ids + wrote.ids
    assert renderer.tokenizer.decode(second.ids) == renderer.render(second.messages)


def test_prompting_again_without_a_completion_gives_the_same_prompt():
    view = RENDERERS["tiny:qwen3-s"].view("b")
    assert view.prompt([problem("p")], 4) == view.prompt([problem("p")], 4)


def test_parts_that_are_not_text_reach_the_template_as_parts():
    renderer = RENDERERS["tiny:qwen3-s"]
    picture = {"type": "image", "image": "x.png"}
    entry = Entry("problem", parts=(text_part("see"), picture))
    content = renderer.messages([entry, foreign("7")])[0]["content"]
    assert content == [text_part("see"), picture, text_part("\n"), text_part("a: 7")]


def overflow_entries():
    long = "12345678"
    return [problem("p"), foreign(long, "a"), own("x"), foreign(long, "c"), foreign("9", "a")]


def test_overflow_drops_the_oldest_foreign_messages_and_says_how_many():
    entries = overflow_entries()
    full = len(RENDERERS["tiny:qwen3-s"].view("b").prompt(entries, 4).ids)
    # The oldest stands in "p\na: 12345678": line end, name, colon and 8 digits are 11 tokens.
    for limit, dropped in ((full + 4, 0), (full + 3, 1), (full + 4 - 11, 1), (full + 3 - 11, 2)):
        prompt = renderer_with(TemplateSettings(), limit).view("b").prompt(entries, 4)
        assert prompt.dropped == dropped
        assert len(prompt.ids) + 4 <= limit
        contents = [m["content"] for m in prompt.messages]
        assert contents[0].startswith("p") and contents[1] == "x" and "a: 9" in contents[2]


def test_what_was_dropped_stays_dropped_and_the_prompt_grows_again():
    entries = overflow_entries()
    # All but one token of the first prompt fits; without the oldest there is room to go on.
    full = len(RENDERERS["tiny:qwen3-s"].view("b").prompt(entries, 4).ids)
    renderer = renderer_with(TemplateSettings(), full + 3)
    view = renderer.view("b")
    first = view.prompt(entries, 4)
    assert first.dropped == 1
    wrote = completion(renderer, "y")
    view.wrote(wrote)
    second = view.prompt([*entries, own("y")], 4)
    assert second.dropped == 1
    assert second.ids[: len(first.ids) + 2] == first.ids + wrote.ids


def test_overflow_that_cannot_be_mended_names_seat_lengths_and_mend():
    renderer = renderer_with(TemplateSettings(), 20)
    with pytest.raises(EpisodeFailure, match=r"seat 'b'.*max_new_tokens.*context of 20.*lower"):
        renderer.view("b").prompt([problem("1234567890" * 3), foreign("9")], 4)


def test_a_tokenizer_without_template_needs_one():
    bare = tiny_tokenizer("tiny:qwen3-s")
    bare.chat_template = None
    with pytest.raises(UserError, match=r"template\.chat"):
        ChatRenderer(bare, TemplateSettings(), 99)
    assert ChatRenderer(bare, TemplateSettings(chat=COUNTING), 99).view("b")


def test_a_broken_template_is_reported():
    with pytest.raises(UserError, match=r"template\.chat"):
        renderer_with(TemplateSettings(chat="{% for %}"))


def test_the_newest_foreign_message_is_never_dropped():
    entries = overflow_entries()
    full = len(RENDERERS["tiny:qwen3-s"].view("b").prompt(entries, 4).ids)
    # Without both long messages (11 tokens each) it does not fit; without all three it would.
    with pytest.raises(EpisodeFailure, match="seat 'b'"):
        renderer_with(TemplateSettings(), full + 4 - 22 - 1).view("b").prompt(entries, 4)


def test_a_template_that_trims_is_rendered_anew_where_there_is_something_to_trim():
    trimming = (
        "{%- for m in messages -%}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
        "{%- endfor -%}{{ '<|im_start|>assistant\n' }}"
    )
    renderer = renderer_with(TemplateSettings(chat=trimming))
    assert renderer.append_only
    for start, text, reply in ((" p", "x", "z"), ("p", " x", "z"), ("p", "x", "z\n")):
        view = renderer.view("b")
        first = view.prompt([problem(start)], 4)
        assert renderer.tokenizer.decode(first.ids) == renderer.render(first.messages)
        view.wrote(completion(renderer, text))
        entries = [problem(start), own(text), Entry("observation", reply)]
        second = view.prompt(entries, 4)
        assert renderer.tokenizer.decode(second.ids) == renderer.render(second.messages)


def test_only_texts_that_come_again_are_held():
    renderer = renderer_with(TemplateSettings())
    encoded = []
    tokenizer = renderer.tokenizer

    class Counted:
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text, **options):
            encoded.append(text)
            return tokenizer(text, **options)

    renderer.tokenizer = Counted()
    # Four samples of two problems, one after another: the first prompts are encoded once a problem.
    for content in ("a long question " * 40, "another one " * 40):
        for _ in range(4):
            renderer.view("b").prompt([problem(content)], 4)
    assert len(encoded) == 2
    # A hundred long texts that nobody asks for again push one another out.
    for number in range(100):
        renderer.encode(f"{number} " * 200)
    assert renderer._recent.cache_info().currsize == renderer._recent.cache_info().maxsize == 64
    assert renderer._short.cache_info().maxsize * 256 < 2**21  # letters held at most


def test_long_and_short_texts_have_the_same_ids_as_without_a_cache():
    renderer = RENDERERS["tiny:qwen3-s"]
    for text in ("x" * 256, "x" * 257, "a: 7"):
        for _ in range(2):
            assert list(renderer.encode(text)) == renderer.tokenizer(text)["input_ids"]


# As reasoning models' templates do it: the prompt ends inside a thought.
OPENS = FORGETFUL.replace("<think></think>", "").replace(
    "assistant\n' }}", "assistant\n<think>\n' }}"
)
KEEPS = OPENS.replace(".split('</think>')[-1]", "")


@pytest.mark.parametrize("template", [OPENS, KEEPS], ids=["forgets thoughts", "keeps them"])
def test_a_thought_that_the_template_opens_begins_the_message(template):
    renderer = renderer_with(TemplateSettings(chat=template))
    view = renderer.view("b")
    first = view.prompt([problem("p")], 9)
    assert first.opening == "<think>\n"
    wrote = completion(renderer, "hm</think>7")
    view.wrote(wrote)
    # The message holds what the prompt began; a cut one of another seat is not shown.
    said = first.opening + wrote.text
    seen = [problem("p"), own(said), foreign("<think>\nis it 8, or 9", "a")]
    second = view.prompt(seen, 9)
    assert second.messages[1]["content"] == "<think>\nhm</think>7"
    assert second.messages[2]["content"] == "a: "
    assert renderer.tokenizer.decode(second.ids) == renderer.render(second.messages)
    assert second.opening == "<think>\n"
    if template == KEEPS:  # then the prompt grows by what was sampled
        grown = [*first.ids, *wrote.ids]
        assert list(second.ids[: len(grown)]) == grown


def test_a_template_that_opens_no_thought_adds_nothing():
    for renderer in (*RENDERERS.values(), renderer_with(TemplateSettings(chat=FORGETFUL))):
        assert renderer.view("b").prompt([problem("say <think>")], 9).opening == ""
