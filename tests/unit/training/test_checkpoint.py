import hashlib
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kills import killed_at

from perlhf.config.stages import SftConfig
from perlhf.errors import CheckpointError, StorageError
from perlhf.runs.run import open_run
from perlhf.system.files import sealed
from perlhf.training import checkpoint


@contextmanager
def files_no_larger_than(size: int):
    """The system refuses larger files (EFBIG), as a full disk does; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(run: Path, step: int, keep_last: int = 2, pinned: int | None = None) -> Path:
    tensors = {"policy": {"a": torch.full((4,), float(step))}, "optimizer": {"0.step": torch.tensor(float(step))}}
    return checkpoint.save(run, step, tensors, {"step": step, "best": None}, keep_last=keep_last, pinned=pinned)


def steps(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint.load(tmp_path) is None


def raw_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_round_trip_is_exact(tmp_path):
    shared = torch.arange(6, dtype=torch.float32)
    tensors = {
        "policy": {
            "bfloat16": torch.tensor([1.0, -0.0, 3.140625], dtype=torch.bfloat16),
            "not.finite": torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45]),
            "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
            "tied": shared,
            "tied.too": shared,
            "half": shared[3:],
        },
        "random": {
            "state": torch.get_rng_state(),
            "ids": torch.tensor([[1, 2**40]]),
            "mask": torch.tensor([True, False]),
        },
        "empty": {},
        "nothing_in_it": {"zero_rows": torch.zeros(0, 3)},
    }
    state = {
        "best": 0.1 + 0.2,
        "worst": float("-inf"),
        "text": "Größe ☕\u2028",
        "list": [1, None, True],
        "deep": {"x": [{}]},
    }
    path = checkpoint.save(tmp_path, 20, tensors, state)
    loaded = checkpoint.load(tmp_path)
    assert path == tmp_path / "checkpoints" / "00000020" and loaded is not None
    assert loaded.step == 20 and loaded.state == state and loaded.state["list"][2] is True
    assert loaded.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert loaded.tensors[name].keys() == expected.keys()
        for key, tensor in expected.items():
            found = loaded.tensors[name][key]
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert raw_bytes(found) == raw_bytes(tensor), f"{name}.{key}"


def test_newest_is_loaded_and_any_step_by_number(tmp_path):
    for step in (9, 10, 100_000_000):
        save(tmp_path, step, keep_last=3)
    newest, older = checkpoint.load(tmp_path), checkpoint.load(tmp_path, 9)
    assert newest is not None and newest.step == 100_000_000 and newest.tensors["policy"]["a"][0].item() == 1e8
    assert older is not None and older.step == 9 and older.tensors["policy"]["a"].tolist() == [9.0] * 4


def test_a_step_that_is_not_there(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 11\n  allowed: steps: 10"):
        checkpoint.load(tmp_path, 11)


def test_older_ones_are_deleted_except_the_pinned(tmp_path):
    save(tmp_path, 10)
    for step in (20, 30, 40):
        save(tmp_path, step, pinned=10)
    assert steps(tmp_path) == ["00000010", "00000030", "00000040"]
    save(tmp_path, 50, keep_last=1, pinned=40)
    assert steps(tmp_path) == ["00000040", "00000050"]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 5, {"old": {"a": torch.zeros(1)}}, {})
    save(tmp_path, 5)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None and list(loaded.tensors) == ["policy", "optimizer"] and steps(tmp_path) == ["00000005"]


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": [{"b": (1,)}]}])
def test_state_that_json_would_change_is_an_internal_error(tmp_path, state):
    with pytest.raises(AssertionError, match="no tuples"):
        checkpoint.save(tmp_path, 1, {}, state)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("position", [0, 20, -1])
def test_flipped_byte_names_the_file_and_the_step_that_is_still_good(tmp_path, name, position):
    save(tmp_path, 10)
    save(tmp_path, 20)
    damaged = tmp_path / "checkpoints" / "00000020" / name
    flip(damaged, position)
    for step in (None, 20):
        with pytest.raises(CheckpointError, match=r"step 10 is still good: delete .*00000020") as caught:
            checkpoint.load(tmp_path, step)
        assert str(caught.value).startswith(f"{damaged}: ")
    older = checkpoint.load(tmp_path, 10)
    assert older is not None and older.step == 10
    shutil.rmtree(damaged.parent)
    newest = checkpoint.load(tmp_path)
    assert newest is not None and newest.step == 10


def test_any_flipped_byte_of_the_state_is_seen(tmp_path):
    file = save(tmp_path, 10) / checkpoint.STATE_FILE
    good = file.read_bytes()
    json.loads(good)
    for position in range(len(good)):
        flip(file, position)
        with pytest.raises(CheckpointError, match=r"state\.json: .*\n.*no older checkpoint is intact") as caught:
            checkpoint.load(tmp_path)
        assert str(file) in str(caught.value), position
        file.write_bytes(good)
    for cut in (b"", good[:5], good[:-1], good + b"\n"):
        file.write_bytes(cut)
        with pytest.raises(CheckpointError, match="state is damaged"):
            checkpoint.load(tmp_path)


def test_two_damaged_ones_are_not_called_good(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    for step in (20, 30):
        flip(tmp_path / "checkpoints" / f"{step:08d}" / "policy.safetensors", -1)
    with pytest.raises(CheckpointError, match="step 10 is still good"):
        checkpoint.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    (save(tmp_path, 10) / "policy.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"policy\.safetensors: a file of the checkpoint is missing"):
        checkpoint.load(tmp_path)


def test_a_directory_without_its_last_file_does_not_exist(tmp_path):
    save(tmp_path, 10)
    (save(tmp_path, 20) / checkpoint.STATE_FILE).unlink()
    leftover = tmp_path / "checkpoints" / ".tmp-00000030-abcd"
    shutil.copytree(tmp_path / "checkpoints" / "00000010", leftover)
    newest = checkpoint.load(tmp_path)
    assert newest is not None and newest.step == 10


def test_disk_full_while_saving_keeps_the_previous_one_and_leaves_nothing_else(tmp_path):
    save(tmp_path, 10)
    large = {"small": {"a": torch.zeros(1)}, "large": {"a": torch.zeros(100_000)}}
    with files_no_larger_than(50_000), pytest.raises(StorageError, match=r"00000020: can't write: .*File too large"):
        checkpoint.save(tmp_path, 20, large, {})
    with files_no_larger_than(50_000), pytest.raises(StorageError, match="free some disk space"):
        checkpoint.save(tmp_path, 20, {}, {"rollout": list(range(20_000))})
    with files_no_larger_than(50_000), pytest.raises(StorageError):
        checkpoint.save(tmp_path, 10, large, {})
    assert steps(tmp_path) == ["00000010"]
    newest = checkpoint.load(tmp_path)
    assert newest is not None and newest.tensors["policy"]["a"].tolist() == [10.0] * 4
    checkpoint.save(tmp_path, 20, large, {})
    assert steps(tmp_path) == ["00000010", "00000020"]


def test_an_interrupt_while_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20)
    assert steps(tmp_path) == ["00000010"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(StorageError, match="can't write"):
        save(tmp_path, 10)


def train(run_dir: Path, updates: int) -> None:
    """Something like a run: it goes on from its checkpoint, and each update writes a rollout, a line, a checkpoint."""
    with open_run(run_dir, "sft", SftConfig(run=run_dir), {}) as run:
        loaded = checkpoint.load(run_dir)
        first = loaded.step if loaded else 0
        run.rewind(first if loaded else -1)
        for step in range(first + 1, first + 1 + updates):
            run.write_rollout(step, [{"step": step}] * 3)
            run.log(step, {"loss": float(step)})
            tensors = {name: {"a": torch.full((50,), float(step))} for name in "xy"}
            checkpoint.save(run_dir, step, tensors, {"at": step})


def test_killed_at_any_write_a_complete_checkpoint_is_newest_and_steps_never_go_back(tmp_path):
    run, found, leftovers = tmp_path / "run", [0], 0
    train(run, 1)
    for count in range(1, 100, 2):
        assert killed_at(count, lambda: train(run, 4)), "four updates are more than a hundred events"
        leftovers += len(list(run.glob("**/.tmp-*")))
        loaded = checkpoint.load(run)
        assert loaded is not None
        values = {float(v) for n in "xy" for v in (loaded.tensors[n]["a"].min(), loaded.tensors[n]["a"].max())}
        assert values == {float(loaded.step)} and loaded.state == {"at": loaded.step}, (values, loaded)
        found.append(loaded.step)
    assert found == sorted(found) and found[-1] > 20, found
    assert leftovers > 10, "kills came while something was being written"
    train(run, 0)
    assert not list(run.glob("**/.tmp-*")), "cleaned when the run was opened again"
    last = found[-1]
    metrics = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics == list(range(1, last + 1)), "no line is lost, doubled or half-written"
    assert sorted(int(file.stem) for file in (run / "rollouts").iterdir()) == list(range(1, last + 1))


def test_a_renamed_checkpoint_is_not_that_of_another_step(tmp_path):
    """Taken for step 40, it would skip twenty updates."""
    save(tmp_path, 10)
    directory = save(tmp_path, 20)
    directory.rename(directory.with_name("00000040"))
    with pytest.raises(CheckpointError, match="named for step 40, but holds the checkpoint of step 20") as error:
        checkpoint.load(tmp_path)
    assert "allowed: 00000020" in str(error.value) and "step 10 is still good" in str(error.value)


@pytest.mark.parametrize(
    "said", [{}, {"step": "20", "files": {}, "state": {}}, {"step": 20, "files": [], "state": {}}, {"step": 20}]
)
def test_a_sealed_state_of_something_else_is_named(tmp_path, said):
    directory = save(tmp_path, 20)
    (directory / "state.json").write_bytes(sealed(said))
    with pytest.raises(CheckpointError, match="not what a checkpoint's state says"):
        checkpoint.load(tmp_path)


def test_a_file_that_holds_no_tensors_is_named(tmp_path):
    directory = save(tmp_path, 20)
    (directory / "policy.safetensors").write_bytes(b"x" * 40)
    said = {"step": 20, "files": {"policy.safetensors": hashlib.sha256(b"x" * 40).hexdigest()}, "state": {}}
    (directory / "state.json").write_bytes(sealed(said))
    with pytest.raises(CheckpointError, match="no file of tensors"):
        checkpoint.load(tmp_path)
