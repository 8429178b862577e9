import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forks import forked

from perlhf.config.stages import LogConfig, OptimConfig, RewardConfig, SftConfig
from perlhf.errors import ConfigError, RunError, StorageError
from perlhf.model.finished import read_run
from perlhf.runs.run import open_run

FACTS = {"data": {"feedback.json": "aa11"}, "base": {"name": "tiny", "sha256": "bb22"}}


def opened(path: Path, config: SftConfig | None = None, facts: dict | None = None):
    return open_run(path, "sft", config or SftConfig(run=path), FACTS if facts is None else facts)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def files_no_larger_than(size: int):
    """The system refuses larger files (EFBIG), as a full disk does; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_from_start_to_result(tmp_path):
    path = tmp_path / "runs" / "sft"
    with opened(path, SftConfig(run=path, seed=7)) as run:
        assert run.path == path and not run.finished
        with pytest.raises(RunError, match="isn't finished"):
            run.result()
        run.log(1, {"loss": 1.5, "tokens": 3, "note": "Größe"})
        run.log(2, {"loss": float("nan")})
        run.finish({"updates": 2, "validation_loss": float("inf"), "curve": (1, 2)})
        assert run.finished
    first, second = lines(path)
    assert (first["step"], first["loss"], first["tokens"], first["note"]) == (1, 1.5, 3, "Größe")
    assert 0 <= first["time_seconds"] <= second["time_seconds"] < 60
    assert second["loss"] is None, "strict JSON has no NaN"
    result = json.loads((path / "result.json").read_text())
    assert (result["stage"], result["updates"], result["validation_loss"], result["curve"]) == ("sft", 2, None, [1, 2])
    assert result["seconds"] >= second["time_seconds"] and result["peak_memory_bytes"] > 10_000_000
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["stage"] == "sft" and manifest["seed"] == 7 and manifest["facts"] == FACTS
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["versions"]["torch"] and manifest["hardware"]["cores"] >= 1
    assert manifest["wall_seconds"] == pytest.approx(result["seconds"], abs=5)
    assert manifest["peak_memory_bytes"] == result["peak_memory_bytes"]
    assert len(manifest["sessions"]) == 1 and manifest["sessions"][0]["pid"] == os.getpid()
    assert manifest["sessions"][0]["openmp"] == {
        name: value
        for name, value in os.environ.items()
        if name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    }

    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with opened(path, SftConfig(run=path, seed=7)) as run:
        assert run.finished and run.result() == result
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before, "a finished run is left as it is"


def test_values_given_by_the_stage_win_in_the_result(tmp_path):
    with opened(tmp_path / "run") as run:
        run.finish({"seconds": 1.0, "peak_memory_bytes": 2})
        assert run.result() == {"stage": "sft", "seconds": 1.0, "peak_memory_bytes": 2}


def test_wall_time_adds_up_over_sessions_even_after_a_crash(tmp_path):
    with opened(tmp_path / "run") as run:
        time.sleep(0.2)
        assert 0.2 <= run.seconds < 30
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "run") as run:
        run.rewind(-1)
        time.sleep(0.2)
        run.log(1, {})
        raise ZeroDivisionError
    with opened(tmp_path / "run") as run:
        assert run.seconds >= 0.4
        run.rewind(1)
        run.finish({})
        assert run.result()["seconds"] >= 0.4
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["wall_seconds"] >= 0.4 and len(manifest["sessions"]) == 3
    assert ["ended" in session for session in manifest["sessions"]] == [True, False, True]


def test_what_is_known_late_is_noted_and_told_where_it_was_another(tmp_path, capsys):
    path = tmp_path / "sft"
    tree, rows = {"packing": "tree", "why": "so"}, {"packing": "none", "why": "it has mamba layers"}
    with opened(path) as run:
        run.note("way", tree)
        assert json.loads((path / "manifest.json").read_text())["way"] == tree
    with opened(path) as run:
        run.note("way", tree)
    assert not capsys.readouterr().err
    with opened(path) as run:
        run.note("way", rows)
    assert json.loads((path / "manifest.json").read_text())["way"] == rows
    told = capsys.readouterr().err
    assert told == f"note: way is {rows!r} but was {tree!r} before; the result may not be bit-equal\n"


def test_rewind_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "run"
    with opened(path) as run:
        for step in range(5):
            run.log(step, {"loss": float(step)})
            run.write_rollout(step, [{"step": step}])
    whole = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(whole + b'{"step": 5, "loss"')
    with opened(path) as run:
        run.rewind(2)
        run.log(3, {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert sorted(file.name for file in (path / "rollouts").iterdir()) == [f"{step:08d}.jsonl" for step in range(3)]
    with opened(path) as run:
        run.rewind(-1)
    assert (path / "metrics.jsonl").read_bytes() == b"" and not list((path / "rollouts").iterdir())


def test_rewind_keeps_every_byte_of_what_stays(tmp_path):
    path = tmp_path / "run"
    with opened(path) as run:
        run.log(1, {"text": "line\u2028separator\r\x0b"})
        run.log(2, {"loss": 0.1})
    before = (path / "metrics.jsonl").read_bytes()
    with opened(path) as run:
        run.rewind(2)
    assert (path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", [b"\0\0", b'{"step": Infinity}', b"[" * 100_000], ids=["zeros", "infinite", "deep"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "run"
    with opened(path) as run:
        run.log(1, {})
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(line + b'\n{"step": 3}\n')
    with opened(path) as run, pytest.raises(RunError, match=r"metrics\.jsonl:2: not a line of metrics"):
        run.rewind(3)


def test_what_was_measured_at_the_end_joins_the_last_line_and_is_taken_back(tmp_path):
    path = tmp_path / "run"
    with opened(path) as run:
        run.log(1, {"loss": 2.0})
        run.log(2, {"loss": 1.0})
        run.amend(2, {"validation_loss": 0.5})
        run.amend(2, {"validation_loss": 0.25})  # after a kill, once more
        first, second = lines(path)
        assert (second["loss"], second["validation_loss"], "validation_loss" in first) == (1.0, 0.25, False)
    with opened(path) as run:
        run.rewind(2)
        run.withdraw(1, "validation_")  # not the last line
        assert lines(path) == [first, second]
        run.withdraw(2, "validation_")
        del second["validation_loss"]
        assert lines(path) == [first, second]
        run.log(3, {"loss": 0.5})
        assert [line["step"] for line in lines(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"epochs": 1}, {"epochs": 3}, None),
        ({"max_updates": 3}, {"max_updates": 4}, None),
        ({"max_updates": 3}, {"max_updates": None}, None),
        ({"max_updates": None}, {"max_updates": 4}, "max_updates is 4, but None"),
        ({"max_updates": 3, "epochs": 2}, {"max_updates": 2, "epochs": 3}, "max_updates is 2, but 3"),
        ({"epochs": 1, "optim": {"schedule": "linear"}}, {"epochs": 2}, r"schedule: linear\) falls to 0"),
    ],
)
def test_totals_may_grow(tmp_path, before, now, message):
    path = tmp_path / "run"
    with opened(path, SftConfig.model_validate({"run": path, **before})) as run:
        run.log(1, {"loss": 1.0})
        run.finish({"updates": 1})
    kept = (path / "config.yaml").read_bytes()
    config = SftConfig.model_validate({"run": path, **before, **now})
    if message:
        with pytest.raises(RunError, match=message), opened(path, config):
            pass
        assert (path / "result.json").exists() and (path / "config.yaml").read_bytes() == kept
        return
    with opened(path, config) as run:
        assert not run.finished
    (key,) = now
    session = json.loads((path / "manifest.json").read_text())["sessions"][1]
    assert session["extended"] == {key: {"before": before[key], "now": now[key]}}


def test_a_continued_run_must_be_rewound_before_it_logs(tmp_path):
    with opened(tmp_path / "run") as run:
        run.log(1, {})
    with opened(tmp_path / "run") as run, pytest.raises(AssertionError, match="rewound before it logs"):
        run.log(1, {})


def test_rollouts(tmp_path):
    with opened(tmp_path / "run") as run:
        rows = [{"step": 20, "prompt": [{"role": "user", "content": "a\nb"}], "kl": float("nan")}, {"step": 20}]
        path = run.write_rollout(20, rows)
    assert path == tmp_path / "run" / "rollouts" / "00000020.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{**rows[0], "kl": None}, {"step": 20}]


def test_disk_full_leaves_no_part_of_a_line_rollout_or_result(tmp_path):
    path = tmp_path / "run"
    with opened(path) as run:
        run.log(1, {"loss": 1.0})
        run.write_rollout(1, [{"step": 1}])
        metrics = (path / "metrics.jsonl").read_bytes()
        with files_no_larger_than(len(metrics) + 5):
            with pytest.raises(
                StorageError, match=r"metrics\.jsonl: can't write: File too large\n  try: free some disk"
            ):
                run.log(2, {"loss": 2.0})
            with pytest.raises(StorageError, match=r"00000001\.jsonl"):
                run.write_rollout(1, [{"text": "x" * 1000}])
            with pytest.raises(StorageError):
                run.finish({"text": "x" * 1000})
        assert (path / "metrics.jsonl").read_bytes() == metrics
        assert (path / "rollouts" / "00000001.jsonl").read_text() == '{"step": 1}\n'
        assert not run.finished and not list(path.glob("**/.tmp-*"))
        run.log(2, {"loss": 2.0})
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_disk_full_at_the_start_leaves_no_run(tmp_path):
    path = tmp_path / "run"
    with files_no_larger_than(100), pytest.raises(StorageError, match=r"config\.yaml"), opened(path):
        pass
    assert not (path / "manifest.json").exists() and not list(path.glob(".tmp-*"))
    with opened(path) as run:
        run.log(1, {})


def test_leftovers_of_a_killed_process_are_cleaned(tmp_path):
    path = tmp_path / "run"
    with opened(path):
        pass
    (path / "checkpoints" / ".tmp-00000001-aa").mkdir(parents=True)
    (path / "checkpoints" / ".tmp-00000001-aa" / "a.safetensors").write_bytes(b"half")
    (path / ".tmp-result.json-aa").write_text("half")
    with opened(path):
        assert not list(path.glob("**/.tmp-*"))


def test_first_ctrl_c_asks_to_stop_and_a_second_one_interrupts(tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "run") as run:
        assert not run.stop_requested
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_requested
        assert "press Ctrl-C again to stop at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_asks_to_stop(tmp_path):
    with opened(tmp_path / "run") as run:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_requested


def test_a_closed_terminal_asks_to_stop_and_what_is_printed_then_goes_nowhere(tmp_path):
    """Messages and progress on a terminal that is gone failed with EIO, before anything was saved."""
    ours, terminal = os.openpty()

    def train():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for descriptor in (0, 1, 2):
            os.dup2(terminal, descriptor)
        os.close(terminal)
        os.close(ours)
        with opened(tmp_path / "run") as run:
            os.write(1, b"x")
            while not run.stop_requested:
                time.sleep(0.01)
            sys.stderr = open(2, "w", closefd=False)
            print("after this update", file=sys.stderr, flush=True)
            (tmp_path / "saved").touch()

    child = forked(train)
    os.close(terminal)
    assert os.read(ours, 1) == b"x"
    os.close(ours)  # the system sends SIGHUP
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "saved").exists()


def test_nohup_stays(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with opened(tmp_path / "run") as run:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not run.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone(tmp_path):
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with opened(tmp_path / "run") as run:
            seen.append((signal.getsignal(signal.SIGINT), run.stop_requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_progress_shows_what_is_logged(tmp_path, capsys):
    with opened(tmp_path / "run") as run:
        with run.progress(total=3, start=1, description="sft") as progress:
            for step in (2, 3):
                run.log(step, {"loss": 1.0 / step, "hidden": 5.0})
                progress.advance()
        run.log(3, {"loss": 9.0})
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("sft 2/3 · loss 0.5 · memory ") and shown[-1].startswith(
        "sft 3/3 · loss 0.3333 · memory "
    )


def scalars(path: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"], "no text, nothing that isn't finite"
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    path = tmp_path / "run"
    config = SftConfig(run=path, log=LogConfig(tensorboard=True))
    with opened(path, config) as run:
        for step in range(1, 5):
            run.log(step, {"loss": float(step), "note": "text", "auc": float("nan")})
        # Already readable, so that a kill loses nothing.
        assert scalars(path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    with opened(path, config) as run:
        run.rewind(2)
        for step in (3, 4, 5):
            run.log(step, {"loss": 10.0 * step})
    assert scalars(path) == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


@pytest.mark.parametrize(("package", "log"), [("wandb", {"wandb": "mine"}), ("tensorboard", {"tensorboard": True})])
def test_a_missing_writer_package_names_the_extra_before_anything_is_written(tmp_path, monkeypatch, package, log):
    monkeypatch.setitem(sys.modules, package, None)
    config = SftConfig(run=tmp_path / "run", log=LogConfig.model_validate(log))
    with pytest.raises(
        ConfigError, match=rf"log\.{package}: .*isn't installed\n  try: pip install 'perlhf\[{package}\]'"
    ):
        with opened(tmp_path / "run", config):
            pass
    assert not (tmp_path / "run").exists()


FAKE_WANDB = """
import json
class Error(Exception): pass
def init(**options):
    if options["project"] == "unknown": raise Error("No API key configured")
    options["config"] = options["config"]["log"]
    class Writer:
        def log(self, values, step): record(["log", step, values])
        def finish(self): record(["finish"])
    record(["init", options])
    return Writer()
def record(row):
    with open("RECORD", "a") as file: file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def wandb_record(tmp_path, monkeypatch) -> Iterator[Path]:
    """The package is not installed here and its service can't be reached; this stands for the calls that are made."""
    record = tmp_path / "record"
    (tmp_path / "wandb.py").write_text(FAKE_WANDB.replace("RECORD", str(record)))
    monkeypatch.syspath_prepend(tmp_path)
    yield record
    sys.modules.pop("wandb", None)


def test_wandb_gets_numbers_under_one_id_over_resumes(tmp_path, wandb_record):
    path = tmp_path / "run"
    config = SftConfig(run=path, log=LogConfig(wandb="mine"))
    for step in (1, 2):
        with opened(path, config) as run:
            run.rewind(step - 1)
            run.log(step, {"loss": 0.5, "note": "text", "auc": float("nan")})
    rows = [json.loads(line) for line in wandb_record.read_text().splitlines()]
    options = rows[0][1]
    assert (options["project"], options["resume"], options["config"]["wandb"]) == ("mine", "allow", "mine")
    assert options["id"] == json.loads((path / "manifest.json").read_text())["id"]
    session = [["init", options], ["log", 1, {"loss": 0.5}], ["finish"]]
    assert rows == [*session, session[0], ["log", 2, {"loss": 0.5}], ["finish"]]


def test_wandb_without_login_says_so_when_the_run_is_opened(tmp_path, wandb_record):
    config = SftConfig(run=tmp_path / "run", log=LogConfig(wandb="unknown"))
    with pytest.raises(
        ConfigError, match=r"log\.wandb: W&B can't be used: No API key configured\n  try: run `wandb login`"
    ):
        with opened(tmp_path / "run", config):
            pass
    assert not wandb_record.exists()


def test_opening_a_run_imports_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from perlhf.config.stages import SftConfig\n"
        "from perlhf.runs.run import open_run\n"
        f"with open_run(Path({str(tmp_path / 'run')!r}), 'sft', SftConfig(), {{}}) as run: run.log(1, {{'x': 1.0}})\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["threads"] is None


def test_a_run_in_use_is_refused_until_its_process_dies(tmp_path):
    path = tmp_path / "run"
    code = (
        "import time; from pathlib import Path; from perlhf.config.stages import SftConfig\n"
        "from perlhf.runs.run import open_run\n"
        f"with open_run(Path({str(path)!r}), 'sft', SftConfig(), {FACTS!r}): print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=rf"in use by process {holder.pid}\n"), opened(path):
            pass
        holder.kill()
        holder.wait()
        with opened(path) as run:
            assert not run.finished


def test_a_run_is_refused_twice_in_one_process_and_free_afterwards(tmp_path):
    path = tmp_path / "run"
    with opened(path):
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"), opened(path):
            pass
    with pytest.raises(ZeroDivisionError), opened(path):
        raise ZeroDivisionError
    with opened(path):
        pass


def test_a_run_given_up_between_opening_and_locking_is_refused(tmp_path, monkeypatch):
    """The lock that is won then belongs to a file that has gone, and guards nothing."""
    path, flock = tmp_path / "run", fcntl.flock

    def given_up(descriptor: int, operation: int) -> None:
        (path / ".lock").unlink(missing_ok=True)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", given_up)
    with pytest.raises(RunError, match="another process has just given the run directory up"), opened(path):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "epochs is 1, but 2 in the run that is here"),
        ({"adapter": {"rank": 4}}, r"adapter\.rank is 4, but 16 in"),
        ({"adapter": {"rank": 16, "targets": ("q_proj",)}}, r"adapter\.targets is \['q_proj'\], but 'attention' in"),
        ({"data": {"limit": 5}}, r"data\.limit is 5, but None in"),
        ({"tokens_per_microbatch": 1}, "tokens_per_microbatch is 1, but 512 in"),
    ],
)
def test_another_configuration_is_refused_with_the_key_and_both_values(tmp_path, changes, message):
    path = tmp_path / "run"
    config = {"run": path, "epochs": 2, "adapter": {"rank": 16}, "tokens_per_microbatch": 512}
    with opened(path, SftConfig.model_validate(config)):
        pass
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with (
        pytest.raises(RunError, match=message) as caught,
        opened(path, SftConfig.model_validate({**config, **changes})),
    ):
        pass
    assert "use another run directory, or delete" in str(caught.value)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_checkpoint_interval_writers_and_the_directory_itself_may_change(tmp_path, monkeypatch):
    config = SftConfig(run=tmp_path / "run", optim=OptimConfig(learning_rate=1e-5))
    with opened(tmp_path / "run", config):
        pass
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    changed = config.model_copy(
        update={"run": Path("moved"), "checkpoint_every": 3, "log": LogConfig(tensorboard=True)}
    )
    with opened(Path("moved"), changed) as run:
        assert not run.finished
    assert "checkpoint_every: 3\n" in Path("moved/config.yaml").read_text()


def test_another_stage_is_refused(tmp_path):
    with opened(tmp_path / "run"):
        pass
    with pytest.raises(RunError, match="run of stage 'sft', not 'reward'"):
        with open_run(tmp_path / "run", "reward", RewardConfig(), FACTS):
            pass


def test_other_data_is_refused(tmp_path):
    with opened(tmp_path / "run"):
        pass
    changed = {**FACTS, "data": {"feedback.json": "cc33"}}
    with pytest.raises(RunError, match=r"facts\.data\.feedback\.json is 'cc33', but 'aa11' in"):
        with opened(tmp_path / "run", facts=changed):
            pass


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            1,
            r"made by an earlier version of perlhf \(format 1\)\n  allowed: format 2\n  try: run it again in",
        ),
        (3, "missing or damaged: format 3 instead of 2"),
        (None, "missing or damaged: format None instead of 2"),
    ],
)
def test_a_run_of_another_format_is_neither_continued_nor_used(tmp_path, version, message):
    path = tmp_path / "run"
    with opened(path) as run:
        run.finish({})
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": version}))
    with pytest.raises(RunError, match=message) as caught, opened(path):
        pass
    assert caught.value.where == str(manifest)
    with pytest.raises(RunError, match=message):
        read_run(path)


def test_another_version_is_noted_not_refused(tmp_path, capsys):
    path = tmp_path / "run"
    with opened(path):
        pass
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["versions"]["python"] = "3.1.4"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with opened(path):
        pass
    assert "note: versions.python is " in capsys.readouterr().err
    changed = json.loads((path / "manifest.json").read_text())["sessions"][1]["changed"]
    assert (changed["key"], changed["before"]) == ("versions.python", "3.1.4")


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not a run directory: it has no manifest\.json but holds 'thesis\.txt'"):
        with opened(tmp_path):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="the run directory is a file"), opened(tmp_path / "thesis.txt"):
        pass
    with pytest.raises(StorageError, match="can't write"), opened(tmp_path / "thesis.txt" / "run"):
        pass


def test_a_start_that_was_killed_before_the_manifest_starts_again(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("half: of an older config")
    (path / ".lock").write_text("123\n")
    with opened(path) as run:
        assert not run.finished
    assert "half" not in (path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b"[]"),
        ("manifest.json", b"{}"),
        ("config.yaml", b"a: [\xff"),
        ("config.yaml", b""),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content):
    with opened(tmp_path / "run"):
        pass
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(RunError, match=rf"{file}: missing or damaged: "), opened(tmp_path / "run"):
        pass


def test_a_damaged_result_is_named(tmp_path):
    with opened(tmp_path / "run") as run:
        run.finish({})
        (tmp_path / "run" / "result.json").write_text("{")
        with pytest.raises(RunError, match=r"result\.json: missing or damaged"):
            run.result()
