"""The control of the demo, small: the whole pipeline on the tiny base, with true labels and with shuffled ones.

SFT imitates polite and rude answers alike, the reward model learns from people's labels, the policy is paid by it
alone. The gold score is a rule that no network ever sees.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from toy import BAD, DRINKS, GOOD, read_json, read_lines, write_rows

COMMON = "--encoding.max-tokens 64 --tuning full".split()
IMITATE = (
    "--epochs 40 --max-updates 150 --examples-per-update 16 --validate-every 150 --optim.learning-rate 3e-3".split()
)
JUDGE = "--epochs 4 --max-updates 30 --examples-per-update 16 --validate-every 30 --optim.learning-rate 1e-3".split()
LEARN = (
    "--updates 12 --prompts-per-update 8 --completions-per-prompt 4 --optim.learning-rate 1e-3 --validate-every 12 "
    "--max-completion-tokens 20 --value.warmup-updates 1 --kl-coef 0.2"
).split()


def gold(text: str) -> float:
    """1 for a polite answer, by how it begins."""
    return float(text.startswith(tuple(word[:4] for word in GOOD)))


def answers(count: int, seed: int) -> list[dict[str, Any]]:
    """Polite and rude answers, half each, with what people say of them."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        text = draw.choice(draw.choice((GOOD, BAD)))
        row = {"prompt": f"{draw.choice(DRINKS)} {seed}{number}!", "completion": text, "label": gold(text) == 1}
        rows.append(row | {"group": f"g{seed}{number}"})
    return rows


def mean_gold(policy: Path, steps: range) -> float:
    """Of the completions of some rollouts."""
    rows = [row for step in steps for row in read_lines(policy / "rollouts" / f"{step:08d}.jsonl")]
    return sum(gold(row["completion"]) for row in rows) / len(rows)


@pytest.mark.parametrize("labels", ["true", "shuffled"])
def test_gold_rises_with_true_labels_only(stage, tmp_path: Path, labels: str) -> None:
    shown = [{key: row[key] for key in ("prompt", "completion", "group")} for row in answers(200, 1)]
    sft, done = stage(
        "sft", *COMMON, *IMITATE, "--examples-per-update", "16", data=str(write_rows(tmp_path / "shown.jsonl", shown))
    )
    assert done.code == 0
    judged = answers(240, 2)
    if labels == "shuffled":
        mixed = [row["label"] for row in judged]
        random.Random(12).shuffle(mixed)
        judged = [row | {"label": label} for row, label in zip(judged, mixed, strict=True)]
    path = str(write_rows(tmp_path / "judged.jsonl", judged))
    reward, done = stage("reward", *COMMON, *JUDGE, "--sft", str(sft), data=path)
    assert done.code == 0
    policy, done = stage("policy", *COMMON, *LEARN, "--sft", str(sft), "--reward", str(reward))
    assert done.code == 0
    auc = read_json(reward / "result.json")["validation"]["auc"]
    before, after = mean_gold(policy, range(1, 3)), mean_gold(policy, range(11, 13))
    assert 0.2 < before < 0.7, "SFT imitates both"
    if labels == "true":
        assert auc > 0.9 and after > before + 0.2
    else:
        assert auc < 0.7 and after < before + 0.1
