"""Damage to files: of their bytes, and of what their headers say."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from typing import Any

from sparke.memory import _journal
from sparke.memory._layout import Layout

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 8, -1, 255, 2**15, 2**16, 2**28, 2**31 - 1, 2**31, 2**32, 2**53, 2**62),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**12, 10**18, 10**400, -(2**63)),
    *(0.0, -0.0, 1.5, 1e300, float("nan"), float("inf"), float("-inf")),
)
OTHERS: tuple[Any, ...] = (None, True, False, "", "x", "1", "-1", "9" * 5000, "٣", "\0", [], {})
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "f32")
SHORT = (b"\0", b"\xff", b"{", b"}", b"[", b'"', b",", b":", b"0", b"-", b"9", b"e", b"\n")


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few flips, cuts, repeats and insertions."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(new) + 1)
        span = min(rng.choice((1, 1, 2, 4, 8, 64, 512)), len(new) - at)
        kind = rng.randrange(8)
        if kind == 0 and span:
            new[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            new[at : at + span] = rng.randbytes(span)
        elif kind == 2:
            new[at : at + span] = b""
        elif kind == 3:
            new[at:at] = new[max(0, at - span) : at]
        elif kind == 4:
            new[at : at + 1] = rng.choice(SHORT)
        elif kind == 5:
            new[at:] = b""
        elif kind == 6:
            size = rng.choice((2, 4, 8))
            number = int(rng.choice([n for n in NUMBERS if type(n) is int])) % 256**size
            new[at : at + size] = number.to_bytes(size, "little")
        else:
            new[at : at + span] = bytes(span)
    return bytes(new)


def of_value(rng: random.Random, value: Any) -> Any:
    """One thing in a JSON value changed, anywhere inside it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        new, key = dict(value), rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            del new[key]
        elif kind == 1:
            new[rng.choice((*value, "x", "cond", "scale", "index", "y", ""))] = new.pop(key)
        elif kind == 2:
            new[str(rng.choice(("y", "extra", "__metadata__")))] = new[key]
        else:
            new[key] = of_value(rng, new[key])
        return new
    if isinstance(value, list) and value and rng.random() < 0.8:
        items, at = list(value), rng.randrange(len(value))
        kind = rng.randrange(5)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items.insert(at, items[at])
        elif kind == 2:
            rng.shuffle(items)
        else:
            items[at] = of_value(rng, items[at])
        return items
    if type(value) is int and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, value * 2, value // 2, -value, value << 32))
    if value in DTYPES and rng.random() < 0.8:
        return rng.choice(DTYPES)
    return rng.choice((*NUMBERS, *OTHERS))


def of_text(rng: random.Random, text: bytes) -> bytes:
    """A JSON text with something changed in it."""
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = of_value(rng, value)
    new = json.dumps(value)
    if rng.random() < 0.05 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        new = f"{new[:-1]}, {json.dumps(key)}: {json.dumps(value[key])}}}"  # a name twice
    return new.encode()


def of_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with something changed in its header, whose length is told rightly."""
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    text = of_bytes(rng, text) if rng.random() < 0.1 else of_text(rng, text)
    if rng.random() < 0.3:
        body = body[: rng.randrange(len(body) + 1)]
    elif rng.random() < 0.2:
        body += bytes(rng.choice((1, 4, 64, 4096)))
    return len(text).to_bytes(8, "little") + text + body


def of_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is as it was and whose numbers are not."""
    start = 8 + int.from_bytes(data[:8], "little")
    new = bytearray(data)
    for _ in range(rng.choice((1, 4, 64))):
        at = rng.randrange(start, len(new))
        new[at] = rng.choice((0, 0x7F, 0x80, 0xFF, 0x7C, rng.randrange(256)))
    return bytes(new)


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """One of the above."""
    ways: tuple[Callable[[random.Random, bytes], bytes], ...]
    ways = (of_bytes, of_header, of_header, of_tensors)
    return rng.choice(ways)(rng, data)


def of_lookup(rng: random.Random, data: bytes) -> bytes:
    """An index with something changed inside it, and a checksum that says nothing was."""
    if rng.random() < 0.2:
        return of_safetensors(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    change = of_bytes(rng, body)
    if rng.random() < 0.7:  # as long as it was, so that the sizes in it still agree
        change = (change + bytes(len(body)))[: len(body)]
    header["index"] |= {"shape": [len(change)], "data_offsets": [0, len(change)]}
    header["__metadata__"]["crc32"] = str(zlib.crc32(change))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + change


def of_journal(layout: Layout) -> Callable[[random.Random, bytes], bytes]:
    """Records with something changed inside them, and checksums that say nothing was."""
    size, start = layout.record.itemsize, _journal.CHECKED_FROM

    def change(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.4:
            return of_bytes(rng, data)
        new = bytearray(of_bytes(rng, data))
        for at in range(0, len(new) - size + 1, size):
            crc = zlib.crc32(new[at + start : at + size])
            new[at + 4 : at + 8] = crc.to_bytes(4, "little")
        return bytes(new)

    return change
