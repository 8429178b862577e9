"""SHA-256 of files, kept by what the system says of them."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from perlhf.system import hashes
from perlhf.system.hashes import hash_of, hash_of_settings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours; files of one byte are large, and no clock is coarse."""
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SMALL_BYTES", 1)
    monkeypatch.setattr(hashes, "GRANULARITY_NS", -1)
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    return [file.read_text() for file in (cache / "hashes").iterdir()] if (cache / "hashes").exists() else []


def test_a_hash_is_taken_once(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert hash_of(file) == hashlib.sha256(b"abc").hexdigest()
    (entry,) = (cache / "hashes").iterdir()
    entry.write_text("f" * 64)
    assert hash_of(file) == "f" * 64
    entry.write_text("f" * 10)  # cut off
    assert hash_of(file) == hashlib.sha256(b"abc").hexdigest()


def test_several_files_are_one_after_the_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    assert hash_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"ab").hexdigest()


def test_other_content_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    before = file.stat()
    hash_of(file)
    with file.open("r+b") as opened:  # the same inode
        opened.write(b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_of(file) == hashlib.sha256(b"xbc").hexdigest()


def test_another_file_under_the_name_is_seen(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(b"abc")
    hash_of(file)
    other.write_bytes(b"xyz")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)
    assert hash_of(file) == hashlib.sha256(b"xyz").hexdigest()


def test_a_file_that_has_just_changed_is_hashed_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "GRANULARITY_NS", 2 * 10**9)
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    changed = file.stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: changed + 10**9)
    hash_of(file)
    assert kept(cache) == []
    monkeypatch.setattr(time, "time_ns", lambda: changed + 3 * 10**9)
    assert kept(cache) == [] and [hash_of(file)] == kept(cache)


def test_a_small_file_is_not_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SMALL_BYTES", 4)
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_of(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest() and kept(cache) == []


def test_no_cache_costs_time_only(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_of(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_settings_are_hashed_by_what_they_say(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('{"a": 1, "b": [2], "transformers_version": "4"}')
    other.write_text('{\n "b": [2],\n "a": 1, "_name_or_path": "x"}')
    assert hash_of_settings(one) == hash_of_settings(other) == hashlib.sha256(b'{"a": 1, "b": [2]}').hexdigest()
    other.write_text('{"b": [3], "a": 1}')
    assert hash_of_settings(one) != hash_of_settings(other)
    assert hash_of_settings(one, ("a",)) == hash_of_settings(other, ("a",))
    other.write_text("[1]")
    assert hash_of_settings(other) == hashlib.sha256(b"[1]").hexdigest()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux alone can say what it holds")
def test_what_is_still_held_is_touched_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_bytes(b"0123456789")
    monkeypatch.setattr(hashes, "PIECE_BYTES", 4)
    monkeypatch.setattr(hashes, "SMALL_BYTES", 1)
    read: list[int] = []

    def preadv(descriptor: int, buffers: list[bytearray], start: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        read.append(start)
        if len(read) == 5:
            raise BlockingIOError
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    assert hashes.hash_of(*files) == hashlib.sha256(b"0123456789" * 2).hexdigest()
    assert read == [8, 4, 0, 8, 4]  # the second file first; what lies before a piece that isn't held is left alone
