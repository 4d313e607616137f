import json
import random
from dataclasses import replace

import pytest
import torch

from satune.agents.rendering import ChatRenderer, TemplateSettings
from satune.tiny.training import (
    CHECK_EVERY,
    Row,
    TinySettings,
    batches,
    imitate,
    imitation_loss,
    rate,
    rows_of,
)
from satune.tiny.zoo import (
    SPECS,
    build_tiny,
    fingerprint,
    load_tiny,
    tiny_directory,
    tiny_model,
    tiny_tokenizer,
)
from satune.types import Entry, UserError, text_part

BRIEF = TinySettings(steps=3, batch=4, examples=8, max_steps=3)


def sums(count, seed=0):
    rng = random.Random(seed)
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(count)]
    return [
        [
            Entry("problem", parts=(text_part(f"{a}+{b}"),)),
            Entry("foreign", f"{a + b}", "a"),
            Entry("own", f"{a + b}", "b"),
        ]
        for a, b in pairs
    ]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("spec", SPECS)
def test_sizes_and_families(spec):
    model, tokenizer = tiny_model(spec, 0), tiny_tokenizer(spec)
    low, high = (0.3e6, 0.45e6) if spec.endswith("-s") else (0.9e6, 1.3e6)
    assert low < sum(p.numel() for p in model.parameters()) < high
    assert model.config.model_type == ("qwen3" if "qwen3" in spec else "llama")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 2048
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # Nothing in it that would change what is sampled.
    assert not model.generation_config.to_diff_dict().keys() & {"temperature", "top_p", "top_k"}


def test_models_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, again, other = (weights(tiny_model("tiny:qwen3-s", seed)) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert equal(first, again)
    assert not equal(first, other)


def test_rows_hold_what_a_rollout_feeds_and_mark_messages_and_own_ends():
    tokenizer = tiny_tokenizer("tiny:qwen3-s")
    renderer = ChatRenderer(tokenizer, TemplateSettings(), 2048)
    conversation = [
        Entry("problem", parts=(text_part("3+4-2"),)),
        Entry("own", "7-2", "b"),
        Entry("foreign", "5", "a"),
        Entry("own", "5", "b"),
        Entry("foreign", "never read by this seat", "a"),
    ]
    (row,) = rows_of(conversation, renderer)
    assert tokenizer.decode(row.ids) == (
        "<|im_start|>user\n3+4-2<|im_end|>\n<|im_start|>assistant\n7-2<|im_end|>\n"
        "<|im_start|>user\na: 5<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    )
    written = [id for id, own in zip(row.ids, row.own, strict=True) if own]
    # Own messages with their end, and between them what the other seat said.
    assert tokenizer.decode(written) == "7-2<|im_end|>" + "5" + "5<|im_end|>"
    # From the second own message on there is nothing but it.
    assert row.own[-2:] == (True, True) and not row.own[-3]


def test_rows_start_anew_where_the_template_does():
    tokenizer = tiny_tokenizer("tiny:qwen3-s")
    numbered = (
        "{% for m in messages %}<|im_start|>{{ messages | length }}{{ m.content }}<|im_end|>"
        "{% endfor %}<|im_start|>"
    )
    renderer = ChatRenderer(tokenizer, TemplateSettings(chat=numbered), 2048)
    conversation = [Entry("problem", parts=(text_part("p"),)), *[Entry("own", "x", "b")] * 2]
    rows = rows_of(conversation, renderer)
    assert [tokenizer.decode(row.ids) for row in rows] == [
        "<|im_start|>1p<|im_end|><|im_start|>x<|im_end|>",
        "<|im_start|>3p<|im_end|><|im_start|>3x<|im_end|><|im_start|>3continue<|im_end|>"
        "<|im_start|>x<|im_end|>",
    ]
    # Each own message is learnt once: "x" and its end.
    assert [sum(row.own) for row in rows] == [2, 2]


def test_an_epoch_takes_every_row_once():
    rows = [Row((9,) * (1 + at % 5) + (at,), (False,) * (1 + at % 5) + (True,)) for at in range(21)]
    stream = batches(rows, 4, 0, seed=3)
    # 21 rows in batches of 4: five full ones and one of 1 row.
    epoch = [next(stream) for _ in range(6)]
    assert sorted(id for batch in epoch for id in batch.next_E.tolist()) == list(range(21))


def test_loss_is_that_of_each_row_alone():
    model = tiny_model("tiny:llama-s", 0).double().eval()
    rows = [
        Row((7, 8, 9, 10), (False, True, False, True)),
        Row((11, 12, 13, 14, 15, 16), (False, False, False, True, True, True)),
    ]
    batch = next(batches(rows, 2, 1, seed=0))
    logprobs = []
    for row in rows:
        logits_TV = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        logprobs += [logits_TV[at - 1, row.ids[at]] for at, own in enumerate(row.own) if own]
    expected = -torch.stack(logprobs).mean()
    torch.testing.assert_close(imitation_loss(model, batch), expected, rtol=1e-10, atol=0)


def test_rate_rises_falls_and_decays_again_in_further_rounds():
    settings = TinySettings(steps=100, lr=1.0)
    # Warm-up over 5 steps; then 1 - (step - 5) / 95, at least .05.
    assert [rate(step, settings) for step in (0, 4, 5)] == pytest.approx([0.2, 1.0, 1.0])
    assert rate(52, settings) == pytest.approx(48 / 95)
    assert rate(99, settings) == 0.05
    # Rounds of 200 further steps: half the peak at 100, half of that after 100 more, floor .05.
    assert [rate(step, settings) for step in (100, 200, 299)] == pytest.approx([0.5, 0.25, 0.05])
    assert rate(300, settings) == 0.5


def test_training_is_reproducible_bit_for_bit():
    first, again, other = (
        weights(build_tiny("tiny:qwen3-s", sums(20), replace(BRIEF, seed=seed)).model)
        for seed in (0, 0, 1)
    )
    assert equal(first, again)
    assert not equal(first, other)


def test_training_learns_to_copy():
    # The sum stands in the prompt; 60 steps are plenty to raise the odds of repeating it.
    settings = TinySettings(steps=60, batch=16, max_steps=60)
    base = build_tiny("tiny:llama-s", sums(200), settings)
    renderer = ChatRenderer(base.tokenizer, TemplateSettings(), 2048)
    rows = [row for conversation in sums(50, seed=1) for row in rows_of(conversation, renderer)]
    batch = next(batches(rows, 50, 1, seed=0))
    with torch.no_grad():
        before = imitation_loss(tiny_model("tiny:llama-s", 0), batch)
        after = imitation_loss(base.model, batch)
    assert after < before / 3


@pytest.mark.parametrize(
    ("found", "steps", "reached"),
    [
        ([0.99], 2, True),
        pytest.param([0.5, 0.5, 0.98], 2 + 2 * CHECK_EVERY, True, marks=pytest.mark.slow),
        pytest.param([0.5] * 4, 3 * CHECK_EVERY, False, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_until_the_greedy_target_or_the_last_step(found, steps, reached):
    settings = TinySettings(steps=2, batch=1, max_steps=3 * CHECK_EVERY)
    left = list(found)
    base = build_tiny(
        "tiny:qwen3-s", sums(1), settings, held_out_success=lambda model, tokenizer: left.pop(0)
    )
    assert (base.steps, base.reached, left) == (steps, reached, [])
    assert base.greedy_success == found[-1]


def test_a_loss_that_is_not_finite_stops_training():
    model = tiny_model("tiny:qwen3-s", 0)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"tiny\.lr"):
        imitate(model, [Row((1, 2), (False, True))], 0, BRIEF)


def test_directory_is_built_once_and_opens_as_any_other(tmp_path):
    asked, said = [], []

    def demonstrate(count, seed):
        asked.append((count, seed))
        return sums(count, seed)

    def build(**changes):
        settings = replace(BRIEF, **changes)
        return tiny_directory(
            "tiny:qwen3-s",
            settings,
            "sums",
            demonstrate,
            held_out_success=lambda model, tokenizer: 0.5,
            cache=tmp_path / "cache",
            progress=lambda done, total, message: said.append((done, total)),
        )

    place = build()
    assert build() == place
    assert asked == [(8, 0)]
    assert said[0] == (3, 3)
    assert build(seed=5) != place
    # Nothing half-written is left beside them.
    assert len(list(place.parent.iterdir())) == 2

    figures = json.loads((place / "tiny.json").read_text())
    assert (figures["steps"], figures["greedy_success"], figures["reached"]) == (3, 0.5, False)
    model, tokenizer = load_tiny(place)
    built = build_tiny("tiny:qwen3-s", sums(8, 0), BRIEF)
    assert equal(weights(model), weights(built.model))
    fresh = tiny_tokenizer("tiny:qwen3-s")
    assert tokenizer.chat_template == fresh.chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (383, 381)
    for text in ("3+4-2\na: 17", "1A2B  x", "<|im_start|>user\n<|im_end|>", "ünï ßß\r\n"):
        ids = fresh(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == text


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(count, seed):
        raise RuntimeError("no demonstrations today")

    with pytest.raises(RuntimeError, match="today"):
        tiny_directory("tiny:llama-m", BRIEF, "none", fail, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_tells_everything_apart():
    base = ("tiny:qwen3-s", BRIEF, TemplateSettings(), "relay")
    others = [
        ("tiny:qwen3-m", *base[1:]),
        (base[0], replace(BRIEF, error=0.1), *base[2:]),
        (*base[:2], TemplateSettings(names=False), base[3]),
        (*base[:3], "guess"),
    ]
    assert len({fingerprint(*given) for given in [base, base, *others]}) == 5


def test_errors_name_the_mend(tmp_path):
    with pytest.raises(UserError, match="did you mean tiny:qwen3-s"):
        tiny_model("tiny:qwen-s", 0)
    with pytest.raises(UserError, match="no own messages"):
        build_tiny("tiny:qwen3-s", [[Entry("problem", parts=(text_part("1"),))]], BRIEF)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can be written"):
        tiny_directory("tiny:qwen3-s", BRIEF, "x", lambda n, s: sums(n), cache=tmp_path / "file")
