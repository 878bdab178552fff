"""Changes to documents and bytes that are likely to find errors in a reader: boundaries, wrong types, cuts, nesting."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

INTEGERS = (0, 1, -1, 2, 3, 7, 31, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63))
OTHERS: tuple[Any, ...] = (
    None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", " ", "0", "../x", "a\0b", "\ud800",
    "\x1b]52;c;eA==\x07", "re:(", "re:.*", "re:((?:[a-z._0-9]){1,30}){1,30}[?!]", "é" * 50, "x" * 5000, [], {}, [[]],
    [None], [1], ["x"], {"x": 1}, {"": None}, [1, 2, 3], "model.safetensors", "float8_e4m3fn",
)  # fmt: skip
DEEP = "@deep@"  # stands for JSON that is nested deeper than a recursive parser goes
DIGITS = "@digits@"  # stands for a number with more digits than Python reads
STAND_INS = {DEEP: "[" * 100_000 + "]" * 100_000, DIGITS: "9" * 5000}

Place = tuple[Any, ...]  # the keys and indices that lead to a value in a document


def value(numbers: random.Random) -> Any:
    """An unusual value."""
    drawn = numbers.random()
    if drawn < 0.03:
        return numbers.choice(list(STAND_INS))
    return copy.deepcopy(numbers.choice(INTEGERS if drawn < 0.45 else OTHERS))


def changed_document(numbers: random.Random, document: Any) -> Any:
    """A document of JSON with one to three changes somewhere."""
    document = copy.deepcopy(document)
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        document = _changed_once(numbers, document)
    return document


def json_bytes(numbers: random.Random, document: Any) -> bytes:
    """The document as JSON; rarely with a change of its bytes."""
    text = json.dumps(document)
    for stand_in, long in STAND_INS.items():
        text = text.replace(json.dumps(stand_in), long)
    data = text.encode()
    return changed_bytes(numbers, data) if numbers.random() < 0.1 else data


def changed_bytes(numbers: random.Random, data: bytes, first: int = 0) -> bytes:
    """Bytes with one change at or after `first`."""
    changed = bytearray(data)
    if first >= len(changed):
        return data
    at = numbers.randrange(first, len(changed))
    kind = numbers.randrange(8)
    if kind == 0:
        changed[at] ^= 1 << numbers.randrange(8)
    elif kind == 1:
        changed[at] = numbers.choice((0, 1, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF))
    elif kind in (2, 3):
        size = 4 * (kind - 1)
        number = numbers.choice(INTEGERS) if numbers.random() < 0.8 else numbers.getrandbits(64)
        changed[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    elif kind == 4:
        del changed[at:]
    elif kind == 5:
        inserted = (b"\0", b"{", b"[" * 2000, b"\xff", b'"', b"NaN", b"1e999", b"9" * 5000, b"\n", b"\xed\xa0\x80")
        changed[at:at] = numbers.choice(inserted)
    elif kind == 6:
        del changed[at : at + numbers.choice((1, 4, 8, 100))]
    else:
        changed[at:at] = changed[first : first + numbers.randrange(1, 200)]
    return bytes(changed)


def _changed_once(numbers: random.Random, document: Any) -> Any:
    places = list(_places(document))
    place = numbers.choice(places[1:] or places)
    old = _get(document, place)
    kind = numbers.randrange(8)
    if kind == 0 and place:
        del _get(document, place[:-1])[place[-1]]
        return document
    if kind == 1 and place and isinstance(holder := _get(document, place[:-1]), dict):
        holder[numbers.choice(("", "x", "../x", "a\0b", "\ud800", "__metadata__", f"{place[-1]} "))] = holder.pop(
            place[-1]
        )
        return document
    if kind == 2:
        return _put(document, place, numbers.choice(([old], {"x": old}, [[old]], [old, old])))
    if kind == 3:
        return _put(document, place, copy.deepcopy(_get(document, numbers.choice(places))))
    if kind == 4 and type(old) is int:
        return _put(document, place, old + numbers.choice((-1, 1, 2, -2, 8, -old, old, 1000)))
    if kind == 5 and isinstance(old, dict):
        old[numbers.choice(("x", "", "re:.*", "lm_head"))] = value(numbers)
        return document
    if kind == 6 and isinstance(old, str | int | float):
        return _put(document, place, [old] if isinstance(old, str) else str(old))
    return _put(document, place, value(numbers))


def _places(document: Any, before: Place = ()) -> Iterator[Place]:
    yield before
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, inner in pairs:
        yield from _places(inner, (*before, key))


def _get(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def _put(document: Any, place: Place, new: Any) -> Any:
    if not place:
        return new
    _get(document, place[:-1])[place[-1]] = new
    return document
