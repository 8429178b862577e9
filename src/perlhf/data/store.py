"""Records held outside of Python's memory: a million of them are a file on disk and a few columns of numbers.

`hold` reads records once, as they come. Each is written in a compact form to a temporary file without a name (small
sets stay in memory), and what splits, orders, limits and warnings go by is kept as numbers: its group, its label, how
many bytes its texts have. A record is made again from the file when it is asked for, so that `Records` reads like a
list and takes no more than some 60 bytes for each of them.

The temporary file has no name from the start (`tempfile.TemporaryFile`), so that a killed process leaves nothing. It is
read by position, which threads and forked processes may do at the same time.
"""

import hashlib
import marshal
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from perlhf.data.records import Comparison, Demonstration, Prompt, Rating, Record, Text
from perlhf.errors import StorageError

MEMORY_BYTES = 4 * 2**20
"""What is held in memory before it is written to the file: about what a processor's cache holds."""
ODD = -1
"""The shape of a record of which only the encoder can say how it is rendered: tools, or messages with other keys than
`role` and `content`."""
NO_LABEL, NO_VERDICT, TIE = -1, -1, 2

_TYPES = (Comparison, Rating, Demonstration, Prompt)
COMPARISON, RATING, DEMONSTRATION, PROMPT = range(4)
_CODES: dict[type, int] = {kind: code for code, kind in enumerate(_TYPES)}
_CONTENT = {kind: attrgetter(*kind.__slots__) for kind in _TYPES}

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Facts:
    """What is known of each record without making it again, one array each."""

    kind: NDArray[np.int8]
    """COMPARISON, RATING, DEMONSTRATION or PROMPT."""
    group: NDArray[np.uint64]
    """The first 8 bytes of sha256("{split_seed}:{group}"): the group, and where it falls in [0, 2^64)."""
    label: NDArray[np.int8]
    """Of a rating, 0 or 1; else NO_LABEL."""
    identity: NDArray[np.int64]
    """A hash of all the content but the source."""
    subject: NDArray[np.int64]
    """A hash of what a verdict is about: prompt and completion of a rating, prompt and both sides of a comparison in
    either order; of other records, the prompt."""
    verdict: NDArray[np.int8]
    """Of a rating its label, of a comparison which of its sides was chosen, or TIE where both are the same; else
    NO_VERDICT."""
    prompt_bytes: NDArray[np.uint32]
    completion_bytes: NDArray[np.uint32]
    """Of the longest completion. Both as UTF-8."""
    ascii: NDArray[np.bool_]
    """True where all texts are plain ASCII."""
    against: NDArray[np.bool_]
    """True for a comparison whose margin is negative."""
    shape: NDArray[np.int64]
    """0 for plain text, a hash of the roles for messages of role and content, ODD otherwise."""
    weight: NDArray[np.float64]
    """Of a record's loss; 1 for prompts."""

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, numbers: Numbers) -> "Facts":
        """Those of some of the records."""
        return Facts(*(column[numbers] for column in vars(self).values()))


_ROW = struct.Struct("<b8sbqqbII??qd")
_COLUMNS = np.dtype(
    {
        "names": [*Facts.__dataclass_fields__],
        "formats": ["i1", "<u8", "i1", "<i8", "<i8", "i1", "<u4", "<u4", "?", "?", "<i8", "<f8"],
    },
)
"""One row of facts as `_ROW` packs it."""


class Tally:
    """Collects the facts of records as they come."""

    def __init__(self, split_seed: int = 0):
        self._prefix = hashlib.sha256(f"{split_seed}:".encode())
        self._rows = bytearray()

    def add(self, record: Record) -> None:
        """Notes the facts of one record."""
        # A fifth of the time that reading takes is spent here, hence no loops.
        kind = _CODES[type(record)]
        prompt, prompt_bytes, plain, shape = _text_facts(record.prompt)
        longest, label, verdict, rest, against = 0, NO_LABEL, NO_VERDICT, None, False
        weight = 1.0 if isinstance(record, Prompt) else record.weight
        if isinstance(record, Comparison):
            chosen, longest, chosen_plain, chosen_shape = _text_facts(record.chosen)
            rejected, other, rejected_plain, rejected_shape = _text_facts(record.rejected)
            longest, plain = max(longest, other), plain and chosen_plain and rejected_plain
            shape = (
                _joined(shape, _joined(chosen_shape, rejected_shape)) if chosen_shape or rejected_shape or shape else 0
            )
            first, second = (chosen, rejected) if chosen < rejected else (rejected, chosen)
            subject = hash((prompt, first, second))
            verdict = TIE if chosen == rejected else int(chosen == first)
            content, against = (chosen, rejected), record.margin < 0
            if record.weight != 1.0 or record.margin or record.annotator is not None:
                rest = (repr(record.weight), repr(record.margin), record.annotator)
        elif isinstance(record, Prompt):
            subject, content = _stable(record.prompt), ()
            rest = _frozen(record.columns) if record.columns else None
        else:
            content, longest, completion_plain, completion_shape = _text_facts(record.completion)
            plain, shape = plain and completion_plain, _joined(shape, completion_shape)
            subject = hash((prompt, content))
            if isinstance(record, Rating):
                label = verdict = int(record.label)
                rest = record.annotator
            if record.weight != 1.0:
                rest = (rest, repr(record.weight))
        if record.tools:
            rest, shape = (rest, _frozen(record.tools)), ODD
        identity = hash((kind, prompt, content, record.group, label, rest))
        group = self._prefix.copy()
        group.update(record.group.encode())
        self._rows += _ROW.pack(
            kind,
            group.digest()[7::-1],
            label,
            identity,
            subject,
            verdict,
            prompt_bytes,
            longest,
            plain,
            against,
            shape,
            weight,
        )

    def facts(self) -> Facts:
        """What was noted; nothing may be added afterwards."""
        rows = np.frombuffer(self._rows, dtype=_COLUMNS)
        return Facts(*(np.ascontiguousarray(rows[name]) for name in _COLUMNS.names or ()))


class Records(Sequence[Record]):
    """Records that are made when they are asked for. Made by `hold`; parts of it are Records too.

    Args:
        spool: where the records lie.
        facts: of these records, in order.
        numbers: where each lies in the spool.
        turned: True for a record whose label is to be the other one (`label_noise`).
    """

    def __init__(self, spool: "_Spool", facts: Facts, numbers: Numbers, turned: NDArray[np.bool_] | None = None):
        self._spool, self._facts, self._numbers, self._turned = spool, facts, numbers, turned

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        record = self._spool.record(int(self._numbers[index]))
        return other_label(record) if self._turned is not None and self._turned[index] else record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"<{len(self)} records>"

    @property
    def facts(self) -> Facts:
        """Of these records, in order; labels and verdicts as they were read."""
        return self._facts

    @property
    def labels(self) -> NDArray[np.int8]:
        """Of the ratings 0 or 1, of other records NO_LABEL."""
        label = self._facts.label
        if self._turned is None:
            return label
        return np.where(self._turned & (label != NO_LABEL), 1 - label, label)

    def take(self, which: NDArray[Any]) -> "Records":
        """The records of these numbers, or those where a mask is True, in that order."""
        numbers = np.flatnonzero(which) if which.dtype == bool else which
        turned = None if self._turned is None else self._turned[numbers]
        return Records(self._spool, self._facts.take(numbers), self._numbers[numbers], turned)

    def with_turned(self, turned: NDArray[np.bool_]) -> "Records":
        """The same records, those of the mask with the other label."""
        return Records(self._spool, self._facts, self._numbers, turned)


def hold(records: Iterable[Record], split_seed: int = 0) -> Records:
    """The records of an iterable, which is read once.

    Raises:
        StorageError: the temporary file can't be written.
    """
    if isinstance(records, Records):
        return records
    tally, spool = Tally(split_seed), _Spool()
    for record in records:
        tally.add(record)
        spool.add(record)
    facts = tally.facts()
    return Records(spool, facts, np.arange(len(facts)))


def other_label(record: Record) -> Record:
    """A comparison with its sides exchanged, a rating with the other label; other records as they are."""
    match record:
        case Comparison():
            return replace(record, chosen=record.rejected, rejected=record.chosen)
        case Rating():
            return replace(record, label=not record.label)
        case _:
            return record


def duplicates(facts: Facts) -> int:
    """How many records repeat an earlier one, but for where it was found."""
    return len(facts) - len(np.unique(facts.identity))


def contradictions(facts: Facts) -> int:
    """Number of (prompt, completion) with both labels plus number of pairs judged in both orders."""
    judged = (facts.verdict == 0) | (facts.verdict == 1)
    # A rating and a comparison never have the same subject.
    _, subject = np.unique(facts.subject[judged], return_inverse=True)
    verdict = facts.verdict[judged]
    return int(
        np.count_nonzero(
            np.bincount(subject[verdict == 0], minlength=len(subject)).astype(bool)
            & np.bincount(subject[verdict == 1], minlength=len(subject)).astype(bool)
        )
    )


def warnings(facts: Facts) -> Iterator[str]:
    """What is odd about some records, though they can be used: one sentence each."""
    if repeated := duplicates(facts):
        yield f"{repeated} records repeat another one exactly"
    if contradicted := contradictions(facts):
        yield f"{contradicted} judgements are contradicted by another record (both labels, or both orders)"
    if same := int(np.count_nonzero(facts.verdict == TIE)):
        yield f"{same} comparisons have the same text on both sides"
    if against := int(np.count_nonzero(facts.against)):
        yield f"{against} comparisons have a negative margin: their scores (or `margin`) prefer the rejected side"
    labels = set(facts.label[facts.label != NO_LABEL].tolist())
    if len(labels) == 1:
        label = str(bool(labels.pop())).lower()
        yield f"all ratings have the label {label}: a reward model can't learn from them alone"
    groups = count_groups(facts)
    if 0 < groups < 10:
        yield f"there are only {groups} groups: a split by group may leave a side empty"


def count_groups(facts: Facts) -> int:
    """How many different groups there are."""
    return len(np.unique(facts.group))


def _text_facts(text: Text) -> tuple[int, int, bool, int]:
    """A hash of a text, its bytes, whether it is ASCII, and its shape."""
    if isinstance(text, str):
        plain = text.isascii()
        return hash(text), len(text) if plain else len(text.encode()), plain, 0
    shape, size, plain = 0, 0, True
    for message in text:
        content = message.get("content")
        if not isinstance(content, str) or len(message) != 2:
            return hash(_frozen(text)), 0, False, ODD
        plain = plain and content.isascii()
        size += len(content) if content.isascii() else len(content.encode())
        shape = _joined(shape, hash(message["role"]))
    return hash(_frozen(text)), size, plain, shape


def _joined(first: int, second: int) -> int:
    """One shape of two: 0 where both are plain text, ODD where one is."""
    if first == ODD or second == ODD:
        return ODD
    return hash((first, second)) | 1 << 62 if first or second else 0


def _frozen(value: Any) -> Any:
    """Something that can be hashed, the same for equal JSON and for nothing else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return tuple(sorted((key, _frozen(part)) for key, part in value.items()))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return ("[", *(_frozen(part) for part in value))
    return (repr(value),)


def _stable(prompt: Text) -> int:
    """A hash of a prompt that is the same in every process: which of two equal prompts is dropped goes by it."""
    content = prompt.encode() if isinstance(prompt, str) else b"\0" + repr(_frozen(prompt)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


class _Spool:
    """Records one after the other, in a temporary file beyond the first MEMORY_BYTES."""

    def __init__(self) -> None:
        self._memory, self._written, self._file = bytearray(), 0, None
        self._file: IO[bytes] | None
        self._starts = array("q", [0])
        self._unusual: dict[int, Record] = {}
        """Records with something inside that marshal can't write, such as a date in a column of a Parquet file."""

    def add(self, record: Record) -> None:
        kind = type(record)
        try:
            line = marshal.dumps((_CODES[kind], *_CONTENT[kind](record)))
        except ValueError:
            line = b""
            self._unusual[len(self._starts) - 1] = record
        self._memory += line
        self._starts.append(self._starts[-1] + len(line))
        if len(self._memory) >= MEMORY_BYTES:
            self._write()

    def record(self, number: int) -> Record:
        start, end = self._starts[number], self._starts[number + 1]
        if start == end:
            return self._unusual[number]
        if start >= self._written:
            line = self._memory[start - self._written : end - self._written]
        else:
            assert self._file is not None
            line = os.pread(self._file.fileno(), end - start, start)
        kind, *content = marshal.loads(line)
        return _TYPES[kind](*content)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="perlhf-", buffering=0)
            view = memoryview(self._memory)
            while view:
                view = view[self._file.write(view) :]
            view.release()
        except OSError as error:
            raise StorageError(
                f"can't write the temporary file that holds the records: {error.strerror}",
                where=tempfile.gettempdir(),
                hint="free some disk space there, or set TMPDIR to a directory that has more",
            ) from error
        self._written += len(self._memory)
        self._memory = bytearray()
