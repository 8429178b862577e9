import pytest

from perlhf.errors import RunError, StorageError
from perlhf.system.files import (
    directory_atomic,
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
