import pytest

from perlhf.errors import StorageError
from perlhf.system.files import directory_atomic, remove_directory, remove_leftovers, write_atomic


def names(directory) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a.txt"
    write_atomic(file, "old ☕")
    assert file.read_bytes() == "old ☕".encode()
    write_atomic(file, b"new\x00")
    assert file.read_bytes() == b"new\x00" and names(tmp_path) == ["a.txt"]


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
