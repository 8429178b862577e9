import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest
from forks import forked
from kills import killed_at

from perlhf.errors import RunError, StorageError
from perlhf.system import files
from perlhf.system.files import (
    directory_atomic,
    from_json,
    from_yaml,
    read_json,
    remove_directory,
    remove_leftovers,
    sealed,
    sha256,
    unsealed,
    write_atomic,
    write_json,
)


def names(directory) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a.txt"
    write_atomic(file, "old ☕")
    assert file.read_bytes() == "old ☕".encode()
    write_atomic(file, b"new\x00")
    assert file.read_bytes() == b"new\x00" and names(tmp_path) == ["a.txt"]


def test_parts_are_written_as_they_come_and_kept_only_together(tmp_path):
    file = tmp_path / "a.txt"
    write_atomic(file, (b"%d" % number for number in range(3)))
    assert file.read_bytes() == b"012"

    def failing():
        yield b"new"
        raise ValueError

    with pytest.raises(ValueError):
        write_atomic(file, failing())
    assert file.read_bytes() == b"012" and names(tmp_path) == ["a.txt"]


def test_a_file_in_a_missing_directory_says_where(tmp_path):
    file = tmp_path / "missing" / "a.txt"
    with pytest.raises(StorageError, match="can't write: No such file") as caught:
        write_atomic(file, "x")
    assert str(caught.value).startswith(f"{file}: ") and "permissions" in str(caught.value)


def test_a_file_over_a_directory_leaves_no_temporary(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "a.txt", "x")
    assert names(tmp_path) == ["a.txt"]


def test_a_directory_appears_when_its_block_ends_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "new" / "adapter"
    for content in ("first", "second"):
        with directory_atomic(target) as temporary:
            (temporary / content).write_text(content)
            assert target.exists() == (content == "second")
            assert content == "first" or names(target) == ["first"]
        assert names(target) == [content] and names(tmp_path / "new") == ["adapter"]


def test_an_exception_in_the_block_keeps_the_old_directory(tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), directory_atomic(target) as temporary:
        (temporary / "new").write_text("half")
        raise ZeroDivisionError
    assert names(target) == ["old"] and names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("name", [".", "", "../here", "{}/here"])
def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(StorageError, match="working directory"), directory_atomic(Path(name.format(tmp_path))):
        raise AssertionError
    assert names(tmp_path) == ["here"]


def test_an_error_that_already_says_where_is_passed_on(tmp_path):
    with pytest.raises(StorageError, match=r"^inner: disk full$"), directory_atomic(tmp_path / "adapter"):
        raise StorageError("disk full", where="inner")


def test_only_leftovers_are_removed(tmp_path):
    (tmp_path / ".tmp-a").mkdir()
    (tmp_path / ".tmp-a" / "x").write_text("x")
    (tmp_path / ".tmp-b").write_text("x")
    (tmp_path / ".lock").write_text("x")
    (tmp_path / "kept").mkdir()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert names(tmp_path) == [".lock", "kept"]


def test_removing_a_directory(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_directory(tmp_path / "a")
    remove_directory(tmp_path / "a")
    assert names(tmp_path) == []


def test_json_is_strict_and_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"mean": float("nan"), "parts": (1, float("inf")), "name": "☕"})
    text = (tmp_path / "a.json").read_text("utf-8")
    assert text == '{\n  "mean": null,\n  "parts": [\n    1,\n    null\n  ],\n  "name": "☕"\n}\n'
    assert read_json(tmp_path / "a.json") == {"mean": None, "parts": [1, None], "name": "☕"}


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"{", "Expecting"), (b"[]", "a list instead")]
)
def test_json_that_cannot_be_used_says_which_file(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match=f"missing or damaged: .*{reason}") as caught:
        read_json(tmp_path / "a.json")
    assert caught.value.where == str(tmp_path / "a.json")


def test_sha256_of_files_is_that_of_their_bytes_in_a_row(tmp_path):
    """`printf abc | sha256sum`."""
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    whole = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a", tmp_path / "b") == whole
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == whole


SAID = {"name": "Größe ☕", "numbers": [1, 0.1, float("-inf"), None, True], "deep": {"x": [{}]}}


def test_what_was_sealed_is_read_back(tmp_path):
    """`printf '{"a": 1}' | sha256sum`."""
    assert sealed({"a": 1}).decode().splitlines() == [
        "{",
        '  "a": 1,',
        '  "seal": "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"',
        "}",
    ]
    (tmp_path / "a.json").write_bytes(sealed(SAID))
    assert unsealed(tmp_path / "a.json") == SAID


def test_any_changed_byte_breaks_the_seal(tmp_path):
    file, good = tmp_path / "a.json", sealed(SAID)
    changed = [good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :] for at in range(len(good)) for bit in (1, 32)]
    for content in (*changed, b"", good[:-1], good + b"\n", b"[]", b"{}", b'{"name": 1}'):
        file.write_bytes(content)
        with pytest.raises(ValueError):
            unsealed(file)


# ---- what is not a plain file, and what was there -----------------------------------------------------------------


def test_a_device_and_a_pipe_are_written_to_and_stay(tmp_path):
    """As root, a rename would replace /dev/null by a file; a node of the same kind elsewhere shows it as well."""
    null, pipe = Path("/dev/null"), tmp_path / "pipe"
    before = null.stat()
    write_atomic(null, "gone")
    assert (null.stat().st_ino, null.stat().st_mode) == (before.st_ino, before.st_mode)
    os.mkfifo(pipe)
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, [b"all ", b"of it"])
    reader.join()
    assert heard == [b"all of it"] and pipe.is_fifo() and names(tmp_path) == ["pipe"]
    with pytest.raises(StorageError, match="No space left") as caught:
        write_atomic(Path("/dev/full"), "x")
    assert caught.value.where == "/dev/full"


@pytest.mark.parametrize("target", ["there", "not there yet"])
def test_a_link_stays_and_its_target_is_written(tmp_path, target):
    real, link = tmp_path / "elsewhere" / "a.txt", tmp_path / "link"
    real.parent.mkdir()
    if target == "there":
        real.write_text("old")
    link.symlink_to("elsewhere/a.txt")
    write_atomic(link, "new")
    assert link.is_symlink() and not real.is_symlink() and real.read_text() == "new"
    assert names(tmp_path) == ["elsewhere", "link"] and names(real.parent) == ["a.txt"]


def test_a_link_to_a_directory_stays_and_its_target_is_replaced(tmp_path):
    real, link = tmp_path / "disk" / "adapter", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "old").write_text("old")
    link.symlink_to(real)
    with directory_atomic(link) as temporary:
        (temporary / "new").write_text("new")
    assert link.is_symlink() and names(real) == ["new"] and names(real.parent) == ["adapter"]


def test_what_is_written_over_a_temporary_directory_is_written_into_it(tmp_path):
    """An export has its adapter written so; its lock would wait for itself, and its name be without one."""
    with directory_atomic(tmp_path / "export") as outer:
        with directory_atomic(outer) as inner:
            assert inner == outer
            (inner / "adapter").write_text("x")
        remove_leftovers(tmp_path)
        (outer / "details").write_text("x")
    assert names(tmp_path / "export") == ["adapter", "details"] and names(tmp_path) == ["export"]


def test_a_file_in_the_place_of_a_directory_is_kept(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(StorageError, match="a file is there"), directory_atomic(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "mine" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_while_a_directory_is_replaced_loses_neither(tmp_path, monkeypatch, exchanges):
    """At each write, and at each name that changes; the next command that writes there finds a whole directory."""
    if not exchanges:  # a file system that can't, as some of networks
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target, gone = tmp_path / "run" / "adapter", 0

    def replace() -> None:
        with directory_atomic(target) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text("new")

    for count in range(1, 100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        target.mkdir(parents=True)
        for name in ("a", "b"):
            (target / name).write_text("old")
        killed = killed_at(count, replace)
        gone += not target.exists()
        os.waitpid(forked(lambda: write_atomic(target.parent / "other.txt", "x")), 0)
        assert names(target.parent) == ["adapter", "other.txt"] and names(target) == ["a", "b"], f"event {count}"
        assert len({file.read_text() for file in target.iterdir()}) == 1, f"half old, half new at event {count}"
        if not killed:
            break
    else:
        raise AssertionError("it never came to its end")
    assert count > 5 and (gone == 0 if exchanges else gone > 0)


def test_where_a_new_directory_can_not_be_put_in_place_the_old_one_stays(tmp_path, monkeypatch):
    target, rename = tmp_path / "adapter", os.rename
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def refuse(one, other):
        if Path(other) == target and "old-" not in str(one):
            raise PermissionError(13, "Permission denied")
        rename(one, other)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match="Permission denied"), directory_atomic(target):
        pass
    assert names(target) == ["old"] and names(tmp_path) == ["adapter"]


def test_what_is_rewritten_keeps_its_permissions(tmp_path):
    file, directory = tmp_path / "a", tmp_path / "d"
    file.write_text("old")
    directory.mkdir()
    for mode in (0o600, 0o664, 0o755):
        file.chmod(mode)
        directory.chmod(mode | 0o700)
        write_atomic(file, "new")
        with directory_atomic(directory):
            pass
        assert (file.stat().st_mode & 0o777, directory.stat().st_mode & 0o777) == (mode, mode | 0o700)


def test_files_of_a_directory_may_be_read_by_whom_new_files_may(tmp_path):
    """safetensors makes its files for their owner alone, whatever the umask."""
    for umask, expected in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with directory_atomic(tmp_path / "adapter") as temporary:
                os.close(os.open(temporary / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
                os.close(os.open(temporary / "program", os.O_CREAT | os.O_WRONLY, 0o700))
        finally:
            os.umask(before)
        modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()}
        assert modes == {"weights": expected, "program": expected | 0o100}
        shutil.rmtree(tmp_path / "adapter")


def test_half_a_surrogate_pair_is_written_as_json_escapes_it(tmp_path):
    write_json(tmp_path / "a.json", {"text": "a\ud800b"}, indent=None)
    assert (tmp_path / "a.json").read_bytes() == b'{"text": "a\\ud800b"}\n'
    assert read_json(tmp_path / "a.json") == {"text": "a\ud800b"}


def test_names_may_be_as_long_as_the_system_allows(tmp_path):
    longest = "é" * 127 + "x"
    write_atomic(tmp_path / longest, "x")
    with directory_atomic(tmp_path / ("d" * 255)):
        pass
    assert sorted(len(os.fsencode(name)) for name in names(tmp_path)) == [255, 255]
    with pytest.raises(StorageError, match="File name too long"):
        write_atomic(tmp_path / (longest + "x"), "x")


# ---- what killed processes left -----------------------------------------------------------------------------------


def killed_while_writing(directory: Path) -> None:
    """A process that ends, as by SIGKILL, with a file and a directory half-written."""

    def parts():
        yield b"half"
        with directory_atomic(directory / "model") as temporary:
            (temporary / "weights").write_text("half")
            os._exit(9)

    os.waitpid(forked(lambda: write_atomic(directory / "a.txt", parts())), 0)


def test_what_a_killed_process_left_goes_when_something_is_written_there(tmp_path):
    (tmp_path / ".tmp-of-somebody-else").write_text("kept")
    killed_while_writing(tmp_path)
    assert sum(name.startswith(".tmp-") for name in names(tmp_path)) == 3
    write_atomic(tmp_path / "other.txt", "x")
    assert names(tmp_path) == [".tmp-of-somebody-else", "other.txt"]


def test_what_a_living_process_writes_is_never_swept(tmp_path):
    ready, go_on = os.pipe(), os.pipe()

    def parts():
        os.write(ready[1], b"x")
        os.read(go_on[0], 1)
        yield b"whole"

    child = forked(lambda: write_atomic(tmp_path / "a.txt", parts()))
    os.read(ready[0], 1)
    with directory_atomic(tmp_path / "d"):
        remove_leftovers(tmp_path)
        assert sum(name.startswith(".tmp-") for name in names(tmp_path)) == 2, "the child's file and our directory"
    os.write(go_on[1], b"x")
    os.waitpid(child, 0)
    assert names(tmp_path) == ["a.txt", "d"] and (tmp_path / "a.txt").read_text() == "whole"


def test_a_leftover_that_is_a_link_goes_without_its_target(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / ".tmp-x").symlink_to("mine")
    os.mkfifo(tmp_path / ".tmp-pipe")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["mine"]


def test_a_directory_that_is_deleted_is_locked_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    seen: list[bool] = []

    def look(doomed):
        descriptor = os.open(doomed, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            seen.append(True)
        os.close(descriptor)
        os.rmdir(doomed)

    monkeypatch.setattr(shutil, "rmtree", look)
    remove_directory(tmp_path / "old")
    assert seen == [True] and names(tmp_path) == []


# ---- what files say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["a: !!bool maybe", "a: !!int x", "a: !!timestamp x", "a: !!float z", "a: [", "a: !!python/name:os.x 1"]
)
def test_yaml_that_says_something_else_than_its_tags_is_one_error(text):
    with pytest.raises(ValueError, match="not valid YAML"):
        from_yaml(text)


def test_what_is_nested_too_deeply_is_one_error(tmp_path):
    deep = "[" * 100_000
    for read, text in ((from_json, deep), *((from_yaml, part * 100_000) for part in ("[", "{a: ", "- ", "? "))):
        with pytest.raises(ValueError):
            read(text)
    lines = "".join(f"{' ' * depth}a:\n" for depth in range(1200))
    with pytest.raises(ValueError):
        from_yaml(lines)
    (tmp_path / "a.json").write_text(deep)
    with pytest.raises(RunError, match="missing or damaged: nested too deeply"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="nested too deeply"):
        unsealed(tmp_path / "a.json")
