"""TFRecord framing and `tf.train.Example`, without TensorFlow.

A record is: length (uint64), its CRC (uint32), that many bytes, their CRC (uint32); all little-endian. The bytes are a
protobuf message of three levels: Example.features (1) -> Features.feature (map: key 1, value 2) -> one of bytes_list 1,
float_list 2, int64_list 3, each with its values in field 1. Source: the TFRecord and `example.proto` descriptions of
TensorFlow; the CRC is CRC-32C (RFC 3720), masked (its bits rotated and a constant added).
"""

import struct
from collections.abc import Iterator
from typing import Any

from perlhf.errors import DataError


def read_examples(content: bytes, name: str) -> Iterator[dict[str, Any]]:
    """Features of each `tf.train.Example`: lists of bytes, floats or integers by feature name.

    Raises:
        DataError: the framing, a checksum or the message is damaged; the index of the record is given.
    """
    position = index = 0
    while position < len(content):
        where = f"{name}[{index}]"
        try:
            (length,) = struct.unpack_from("<Q", content, position)
            _check(content[position : position + 8], content, position + 8)
            start, end = position + 12, position + 12 + length
            _check(content[start:end], content, end)
            features = _example(content[start:end])
        except (struct.error, IndexError, ValueError) as error:
            raise DataError(
                f"the TFRecord file is truncated or damaged: {error}", where=where, hint="download or copy it again"
            ) from error
        yield features
        position, index = end + 4, index + 1


def is_tfrecord(content: bytes) -> bool:
    """True when the content begins with a length and its checksum, as no text does."""
    return len(content) >= 12 and _checksum_fits(content[:8], content, 8)


def _example(encoded: bytes) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for _, feature_map in message_fields(encoded):
        for _, entry in message_fields(feature_map):
            parts = dict(message_fields(entry))
            features[_bytes(parts.get(1)).decode()] = _feature(parts.get(2, b""))
    return features


def _feature(encoded: bytes) -> list[Any]:
    for kind, values in message_fields(encoded):
        fields = list(message_fields(values))
        if kind == 1:
            return [value for _, value in fields]
        if kind == 2:
            return [number for _, packed in fields for (number,) in struct.iter_unpack("<f", _bytes(packed))]
        if kind == 3:
            return [
                number for _, packed in fields for number in ([packed] if isinstance(packed, int) else _varints(packed))
            ]
    return []


def message_fields(encoded: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one protobuf message; varints are integers, the rest bytes."""
    position = 0
    while position < len(_bytes(encoded)):
        key, position = _varint(encoded, position)
        match key & 7:
            case 0:
                value, position = _varint(encoded, position)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, position = _varint(encoded, position)
            case 5:
                size = 4
            case wire_type:
                raise ValueError(f"unknown wire type {wire_type}")
        if position + size > len(encoded):
            raise ValueError("a field runs past the end of its message")
        yield key >> 3, encoded[position : position + size]
        position += size


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is missing or of the wrong kind")
    return value


def _varint(encoded: bytes, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        byte = encoded[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number is longer than 10 bytes")


def _varints(packed: bytes) -> list[int]:
    numbers, position = [], 0
    while position < len(packed):
        number, position = _varint(packed, position)
        numbers.append(number)
    return numbers


def _check(data: bytes, content: bytes, position: int) -> None:
    if not _checksum_fits(data, content, position):
        raise ValueError("a checksum doesn't match")


def _checksum_fits(data: bytes, content: bytes, position: int) -> bool:
    (stored,) = struct.unpack_from("<I", content, position)
    crc = crc32c(data)
    return stored == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of `data`."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
