"""What ends a completion: end tokens, stop strings, and that no token is drawn which the tokenizer lacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import END, START, VOCAB, answers, open_encoder, random_ids, randomise
from transformers import LlamaForCausalLM

from perlhf.model.bases.found import Base
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.rollout.local import Ends, Rollout, sample, uniforms


@pytest.fixture
def encoder(tiny_base: Path) -> Encoder:
    return open_encoder(tiny_base)


def ids_of(encoder: Encoder, text: str) -> list[int]:
    encoded: Any = encoder.tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def ended_after(ends: Ends, ids: list[int]) -> int | None:
    """Tokens of a completion that is sampled one by one."""
    return next((count for count in range(1, len(ids) + 1) if ends.end(ids[:count])), None)


@pytest.mark.parametrize(
    ("stop", "text", "kept", "shown"),
    [
        (("\nUser:",), "a tea\nUser: more", "a tea\nUser:", "a tea"),
        (("###", "\nUser:"), "a tea ###\nUser: more", "a tea ###", "a tea"),
        (("the",), "an other one", "an other", "an o"),  # inside a word, and inside a token
        (("☕",), "hot ☕ now", "hot ☕", "hot"),  # several tokens for one character
        (("\nUser:",), "\nUser: at once", "\nUser:", ""),
        (("never said",), "a tea", None, "a tea"),
        ((" ",), "tea now", "tea ", "tea"),
    ],
)
def test_a_stop_string_ends_with_the_token_that_completes_it(
    encoder: Encoder, stop: tuple[str, ...], text: str, kept: str | None, shown: str
) -> None:
    ends, ids = Ends.of(encoder, stop), ids_of(encoder, text)
    count = ended_after(ends, ids)
    if kept is None:
        assert count is None and ends.before(ids) == ids and ends.text(ids) == shown
        return
    assert count is not None
    decoded = str(encoder.tokenizer.decode(ids[:count]))
    assert any(string in decoded for string in stop), "all of the string was sampled"
    assert not any(string in str(encoder.tokenizer.decode(ids[: count - 1])) for string in stop), "and no more"
    assert ends.text(ids[:count]) == shown
    before = str(encoder.tokenizer.decode(ends.before(ids[:count])))
    assert before.startswith(shown) and len(before) < len(decoded)


def test_all_end_tokens_end(encoder: Encoder) -> None:
    ends = Ends((END, START), encoder, ("x",))
    assert ended_after(ends, [5, 6, START, 7]) == 3 and ended_after(ends, [5, END]) == 2


def test_what_may_become_a_stop_string_is_held_back(encoder: Encoder) -> None:
    ends = Ends.of(encoder, ("\nUser:", "###"))
    shown = [ends.settled("a tea\nUser: b"[:size]) for size in range(14)]
    assert shown[5:] == ["a tea"] * 9
    assert ends.settled("a # b") == "a # b" and ends.settled("a ##") == "a "


def test_the_draws_of_a_share_are_those_of_the_whole_update():
    whole = uniforms(3, 7, [4, 9, 4, 2], 2, 5)
    assert torch.equal(uniforms(3, 7, [4, 9, 4, 2], 2, 5, chosen=[1, 2]), whole[2:6])
    assert not torch.equal(whole[0:2], whole[4:6]), "a prompt that occurs again draws anew"


def test_the_sampler_stops_there_and_learns_what_it_sampled(tiny_base: Path, encoder: Encoder) -> None:
    model = Model.load(Base(tiny_base), "float32", "cpu")
    model.add_adapter("policy", "policy", rank=4)
    randomise(model, "policy", size=0.15)
    prompts, draws = random_ids([5, 9]), uniforms(3, 1, [0, 1], 8, 24)

    def roll(ends: Ends) -> Rollout:
        options: dict[str, Any] = {"temperature": 1.0, "max_completion_tokens": 24}
        return sample(model, prompts, adapter="policy", draws=draws, ends=ends, **options)

    endless = roll(Ends([]))
    texts = [str(encoder.tokenizer.decode(ids)) for ids in endless.completions]
    stop = next(text[6:8] for text in texts if "\ufffd" not in text[6:8])
    found = roll(Ends.of(encoder, (stop,)))
    assert stop in "".join(texts) and any(found.ended)
    for ids, logprobs, ended, whole in zip(
        found.completions, found.sampler_logprobs, found.ended, endless.completions, strict=True
    ):
        assert ids == whole[: len(ids)] and len(logprobs) == len(ids)
        if ended and ids[-1] != END:
            assert stop in str(encoder.tokenizer.decode(ids))
            assert stop not in str(encoder.tokenizer.decode(ids[:-1]))
    out = model.logprobs(answers(found.prompts, found.completions), "policy").logprobs
    for row, logprobs in zip(out, found.sampler_logprobs, strict=True):
        assert row[: len(logprobs)].tolist() == pytest.approx(logprobs, abs=1e-4)


def test_rows_of_a_padded_vocabulary_are_never_drawn_and_have_no_share(tiny_base: Path, tmp_path: Path) -> None:
    network = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    network.resize_token_embeddings(VOCAB + 240, mean_resizing=False)
    network.save_pretrained(tmp_path)
    model = Model.load(Base(tmp_path), "float32", "cpu", vocabulary=VOCAB)
    prompts = random_ids([4, 7])
    rolled = sample(
        model,
        prompts,
        adapter=None,
        draws=uniforms(1, 1, [0, 1], 40, 12),
        ends=Ends([END]),
        temperature=1.5,
        max_completion_tokens=12,
    )
    assert max(token for ids in rolled.completions for token in ids) < VOCAB
    states, _ = model.prefill(prompts, None)
    assert model.logits(states, None).shape == (2, VOCAB)
    out = model.logprobs(answers(rolled.prompts, rolled.completions), None, temperature=1.5).logprobs
    for row, logprobs in zip(out, rolled.sampler_logprobs, strict=True):
        assert row[: len(logprobs)].tolist() == pytest.approx(logprobs, abs=1e-4)
    # Without a vocabulary, as nobody masks it, nearly half of the draws would be such rows.
    plain = Model.load(Base(tmp_path), "float32", "cpu")
    assert plain.logits(plain.prefill(prompts, None)[0], None).shape == (2, VOCAB + 240)
