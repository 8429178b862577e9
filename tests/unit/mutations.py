"""What may have happened to a file: values of other types, keys lost, bytes flipped or cut. Seeded, so that a case can
be had again.
"""

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ODD: Sequence[Any] = (
    None, True, False, 0, 1, -1, 0.5, 1e308, 2**31, 2**63, 2**70, float("inf"), float("nan"), "", " ", "x", "0", "\0",
    "\ud800", "\x1b[31m", "[/b]", "../..", "/dev/null", "a" * 300, "é" * 200, "{{ 1/0 }}", [], [[]], [None], {},
    {"": {}}, {"a": [1]}, ["a", 1],
)  # fmt: skip
"""Values that are of another type, too large, empty, or no text that a file can hold."""
WORDS = (
    "!!int x", "!!bool maybe", "!!float .", "!!binary aGk=", "!!set {a}", "!!python/none x", "&a x", "*a", "<<: {}",
    '"\\ud800"', '"\\0"', "'", "{", "[", "- ", "? ", "|", ">", "%", "@", "`", "\t", "1e999", ".inf", "0x1F", "~",
    "!x 1", "2001-01-01", "1_000", "9" * 40, "null", "true",
)  # fmt: skip
"""What a line of YAML may say instead of a value."""


def mutated_json(draw: random.Random, content: bytes) -> bytes:
    """JSON, or JSON lines, with one to three values changed, lost, doubled or moved; else its bytes changed."""
    if draw.random() < 0.2:
        return mutated_bytes(draw, content)
    text = content.decode()
    try:
        values, by_lines = [json.loads(text)], False
    except ValueError:
        values, by_lines = [json.loads(line) for line in text.splitlines()], True
    for _ in range(draw.randint(1, 3)):
        number = draw.randrange(len(values))
        paths = _paths(values[number])
        path = draw.choice(paths)
        values[number] = _changed(draw, values[number], path)
    dumped = [json.dumps(value, indent=None if by_lines else 2) for value in values]
    return "\n".join(dumped).encode() + b"\n"


def mutated_yaml(draw: random.Random, content: bytes) -> bytes:
    """YAML with some lines changed: another value, lost, doubled, indented otherwise; else its bytes changed."""
    if draw.random() < 0.2:
        return mutated_bytes(draw, content)
    lines = content.decode().splitlines()
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        match draw.randrange(6):
            case 0:
                lines[at] = f"{key}{colon or ':'} {draw.choice(WORDS)}"
            case 1:
                lines[at] = f"{key}{colon or ':'} {json.dumps(draw.choice(ODD))}"
            case 2:
                del lines[at]
                lines = lines or [""]
            case 3:
                lines.insert(draw.randrange(len(lines)), lines[at])
            case 4:
                lines[at] = draw.choice(("  ", " ", "\t", "- ")) + lines[at]
            case _:
                lines[at] = draw.choice(WORDS) + colon + lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut off, taken out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1) if draw.random() < 0.7 else draw.randrange(min(len(changed) + 1, 64))
        match draw.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + draw.randint(1, 16)]
            case 3:
                changed[at:at] = changed[at : at + 32]
            case _:
                changed[at:at] = draw.randbytes(draw.randint(1, 8))
    return bytes(changed)


def mutated_safetensors(draw: random.Random, content: bytes) -> bytes:
    """Another header (names, types, shapes, offsets) over the same numbers, or other bytes; numbers become nan."""
    size = int.from_bytes(content[:8], "little")
    choice = draw.random()
    if choice < 0.3:
        return mutated_bytes(draw, content)
    if choice < 0.5:
        at = 8 + size + 4 * draw.randrange(max(1, (len(content) - 8 - size) // 4))
        return (
            content[:at]
            + draw.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f"))
            + content[at + 4 :]
        )
    header = json.loads(content[8 : 8 + size])
    header = _changed(draw, header, draw.choice(_paths(header)))
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + content[8 + size :]


def mutated(draw: random.Random, file: Path) -> None:
    """Changes a file as its suffix asks for; now and then it is emptied, gone, a directory, a dangling link."""
    choice = draw.random()
    if choice < 0.06:
        file.unlink()
        match draw.randrange(4):
            case 0:
                file.mkdir()
            case 1:
                file.symlink_to("nowhere")
            case 2:
                file.touch()
            case _:
                pass
        return
    how = {".json": mutated_json, ".jsonl": mutated_json, ".yaml": mutated_yaml, ".safetensors": mutated_safetensors}
    file.write_bytes(how.get(file.suffix, mutated_bytes)(draw, file.read_bytes()))


def archive(draw: random.Random, suffix: str, content: bytes) -> bytes:
    """An archive of a file, with odd names now and then; damaged in most cases."""
    name = draw.choice(
        ("a.jsonl", "a/b.jsonl", "../a.jsonl", "/a.jsonl", "a" * 300, "a\nb.jsonl", "é.jsonl", "..", "a:b", ".")
    )
    stream = io.BytesIO()
    if suffix == ".gz":
        stream.write(gzip.compress(content))
    elif suffix == ".zip":
        with zipfile.ZipFile(
            stream, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        ) as made:
            made.writestr(name, content)
            made.writestr("b.jsonl", content)
    else:
        with tarfile.open(fileobj=stream, mode=draw.choice(("w", "w:gz"))) as made:
            for one in (name, "b.jsonl"):
                member = tarfile.TarInfo(one)
                member.size = len(content)
                member.type = draw.choice((tarfile.REGTYPE,) * 8 + (tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE))
                made.addfile(member, io.BytesIO(content))
    return stream.getvalue() if draw.random() < 0.2 else mutated_bytes(draw, stream.getvalue())


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in a JSON value; of long lists, the first ones."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    return [path, *(deeper for key, part in list(inside)[:60] for deeper in _paths(part, (*path, key)))]


def _changed(draw: random.Random, value: Any, path: tuple[Any, ...]) -> Any:
    if not path:
        return draw.choice(ODD)
    copied = dict(value) if isinstance(value, dict) else list(value)
    key, rest = path[0], path[1:]
    if rest:
        copied[key] = _changed(draw, copied[key], rest)
        return copied
    match draw.randrange(5):
        case 0:
            del copied[key]
        case 1 if isinstance(copied, dict):
            copied[str(draw.choice(ODD))] = copied.pop(key)
        case 2:
            copied[key] = [copied[key]]
        case _:
            copied[key] = draw.choice(ODD)
    return copied
