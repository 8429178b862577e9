"""`chat` with runs of the real stages on the tiny base."""

import io
import shutil
from pathlib import Path

import pytest
from tiny_runs import TinyRuns, tiny_runs

from perlhf.commands import chat as chatting
from perlhf.commands.chat import chat
from perlhf.config.commands import ChatConfig
from perlhf.errors import ConfigError, RunError
from perlhf.model.finished import read_run
from perlhf.rollout.local import Ends, sample, stream, uniforms


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    """One run of each stage."""
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_what_the_sampler_samples(runs: TinyRuns, temperature: float):
    model, encoder = read_run(runs.policy).open("cpu")
    prompt = encoder.prompt("a large tea please")
    ended = []
    for seed in range(8):
        draws = uniforms(seed, 0, [0], 1, 40)
        rollout = sample(
            model,
            [prompt],
            adapter="policy",
            draws=draws,
            ends=Ends.of(encoder),
            temperature=temperature,
            max_completion_tokens=40,
        )
        ended += rollout.ended
        wanted = rollout.completions[0][:-1] if rollout.ended[0] else rollout.completions[0]
        assert list(stream(model, prompt, "policy", draws[0], Ends.of(encoder), temperature)) == wanted
    assert temperature == 0 or len(set(ended)) == 2


def test_one_message_gets_one_answer(runs: TinyRuns, capsys: pytest.CaptureFixture[str]):
    config = ChatConfig(run=runs.sft, message="a small tea", max_completion_tokens=12, device="cpu")
    question, answer = chat(config)
    assert question == {"role": "user", "content": "a small tea"}
    shown = capsys.readouterr().out
    assert shown.endswith("\n")
    printable = "".join(sign for sign in answer["content"] if sign.isprintable() or sign in "\n\t")
    assert shown.rstrip("\n") == printable.rstrip("\n")
    assert chat(config)[1] == answer


@pytest.mark.parametrize(("stage", "own"), [("policy", 0.4), ("sft", 0.7), (None, 0.7)])
def test_a_policy_talks_at_the_temperature_that_it_was_trained_at(
    runs: TinyRuns, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str | None, own: float
):
    seen: list[float] = []
    monkeypatch.setattr(chatting, "stream", lambda *given: (seen.append(given[-1]), iter(()))[1])
    run = None if stage is None else getattr(runs, stage)
    if stage == "policy":
        run = shutil.copytree(runs.policy, tmp_path / "cold")
        said = (run / "config.yaml").read_text()
        assert "temperature: 1.0" in said
        (run / "config.yaml").write_text(said.replace("temperature: 1.0", "temperature: 0.4"))
    for asked in (None, 0.9):
        chat(ChatConfig(run=run, base=None if run else str(tiny_base), message="a tea", temperature=asked))
    assert seen == [own, 0.9]


def test_the_conversation_is_kept_until_exit_and_new_forgets_it(runs: TinyRuns, monkeypatch: pytest.MonkeyPatch):
    config = ChatConfig(run=runs.policy, max_completion_tokens=8, temperature=0, device="cpu")
    first = chat(config.model_copy(update={"message": "a tea"}))

    def typed(*lines: str) -> list[dict[str, str]]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return [dict(message) for message in chat(config)]

    kept = typed("a tea", "", "large", "/exit", "never read")
    assert [message["role"] for message in kept] == ["user", "assistant", "user", "assistant"]
    assert kept[:2] == first
    assert [message["content"] for message in kept if message["role"] == "user"] == ["a tea", "large"]
    # Input that ends is like /exit.
    assert typed("a tea", "large") == kept
    assert typed("something else", "/new", "a tea") == first


def test_the_system_message_can_be_another_one_than_in_training(runs: TinyRuns, tiny_base: Path):
    config = ChatConfig(run=runs.sft, message="a tea", max_completion_tokens=8, temperature=0, device="cpu")
    assert chat(config) != chat(config.model_copy(update={"system": "You are a pirate, and you sell nothing."}))
    assert len(chat(ChatConfig(base=str(tiny_base), message="a tea", max_completion_tokens=4, device="cpu"))) == 2


def test_an_answer_is_shown_without_its_stop_string(runs: TinyRuns, capsys: pytest.CaptureFixture[str]):
    config = ChatConfig(run=runs.policy, message="a tea", max_completion_tokens=40, temperature=0.7, device="cpu")
    seed, whole = next(
        (seed, text)
        for seed in range(200)
        if len(text := chat(config.model_copy(update={"seed": seed}))[1]["content"]) > 8 and text[:7].isprintable()
    )
    stop = whole[5:7]
    capsys.readouterr()
    answer = chat(config.model_copy(update={"seed": seed, "stop": (stop,)}))[1]["content"]
    assert answer == whole[: whole.index(stop)].strip()
    assert capsys.readouterr().out.strip() == answer


def test_what_cannot_talk_is_refused(runs: TinyRuns):
    with pytest.raises(RunError, match="stage reward") as caught:
        chat(ChatConfig(run=runs.reward, message="a tea"))
    assert "stage policy or sft" in str(caught.value)
    with pytest.raises(ConfigError, match="max_completion_tokens 512"):
        chat(ChatConfig(run=runs.sft, message="a tea", max_completion_tokens=512))
