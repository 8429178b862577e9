"""Errors that nobody foresaw: one sentence, a file that only its owner can read, no secrets."""

import errno
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from perlhf.system.unforeseen import said_of


def raised(error: Exception) -> Exception:
    """The error with a traceback, as `main` catches it."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


def test_a_mistake_of_ours_is_a_sentence_and_a_private_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("JUDGE_API_KEY", "sk-12345678")
    error = raised(KeyError("sk-12345678 of https://me:hunter2@host/x?token=value9"))
    message, code = said_of(error, "perlhf sft")
    assert code == 70
    assert message.startswith("a mistake of perlhf's own, KeyError: ")
    found = re.search(r"\n  the traceback is in (\S+); please report it", message)
    assert found
    file = Path(found[1])
    text = file.read_text("utf-8")
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent == tmp_path
    assert text.startswith("perlhf sft, perlhf ") and "Traceback (most recent call last)" in text
    for said in (message, text):
        assert not any(secret in said for secret in ("sk-1234", "hunter2", "value9"))
        assert "https://[hidden]" in said


def test_where_no_file_can_be_written_the_sentence_says_so(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    message, code = said_of(raised(ValueError("x")), "perlhf")
    assert code == 70 and "the traceback can't be kept: No such file or directory" in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "no", "a\nb"), "a\nb: can't be used: Permission denied"),
        (OSError(errno.EIO, "x", b"raw"), "raw: can't be used: Input/output error"),
        (OSError(errno.ENAMETOOLONG, "x", "long"), "long: can't be used: File name too long"),
        (MemoryError(), "memory is full: no room for more"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            "memory is full",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "the GPU's memory is full: CUDA out of memory"),
    ],
)
def test_what_the_system_refuses_is_no_mistake_of_ours(error, said):
    message, code = said_of(raised(error), "perlhf")
    assert code == 2 and message.startswith(said) and "try:" in message


def test_an_output_that_is_full_is_told_once(monkeypatch):
    calls: list[bool] = []
    monkeypatch.setattr("perlhf.system.unforeseen.discard_output", lambda: calls.append(True))
    message, code = said_of(raised(OSError(errno.ENOSPC, "full")), "perlhf")
    assert code == 2 and message.startswith("can't read or write: No space left on device") and calls == [True]


def test_a_name_that_the_locale_has_no_letters_for(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "latin-1")
    message, code = said_of(raised(UnicodeEncodeError("latin-1", "tee ☕", 4, 5, "no")), "perlhf")
    assert code == 2 and message.startswith("no file can be called 'tee ☕' here: names are latin-1\n  try: ")
    assert said_of(raised(UnicodeEncodeError("ascii", "tee ☕", 4, 5, "no")), "perlhf")[1] == 70
