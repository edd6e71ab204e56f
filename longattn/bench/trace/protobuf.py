"""Reads the event metadata of a trace, which `jax.profiler.ProfileData` leaves out, from the protocol buffer itself.

It holds the compiled programs, whose instructions tell an op's scope, and on a TPU the names of ops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Fields = Mapping[int, Sequence[Any]]


def fields(message: memoryview) -> Fields:
    """Returns the fields of a protocol buffer by number: integers, or the bytes of a field with a length.

    https://protobuf.dev/programming-guides/encoding/
    """
    found: dict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: int | memoryview
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at}: this is no protocol buffer; record the trace again")
        found[number].append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def integers(values: Iterable[Any]) -> Iterator[int]:
    """Yields the values of a repeated integer field, packed or not."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def text(message: Fields, number: int) -> str:
    """Returns a text field, "" if it is not set."""
    return bytes(message[number][-1]).decode(errors="replace") if number in message else ""


class Event(NamedTuple):
    """The metadata that all events of one name in a plane share."""

    display: str
    stats: dict[str, Any]  # text, bytes and integers


def event_metadata(data: bytes) -> dict[str, dict[str, Event]]:
    """Returns the event metadata by plane and event name."""
    # tsl/profiler/protobuf/xplane.proto: XSpace.planes = 1; XPlane.name = 2, .event_metadata = 4, .stat_metadata = 5;
    # XEventMetadata.name = 2, .display_name = 4, .stats = 5; XStat.metadata_id = 1, .uint64_value = 3,
    # .int64_value = 4, .str_value = 5, .bytes_value = 6, .ref_value = 7; a map's entry: key = 1, value = 2.
    planes: dict[str, dict[str, Event]] = {}
    for plane in map(fields, fields(memoryview(data)).get(1, ())):
        entries = [fields(entry) for entry in plane.get(5, ())]
        names = {entry[1][-1] if 1 in entry else 0: text(fields(entry[2][-1]), 2) for entry in entries}
        events = planes.setdefault(text(plane, 2), {})
        for entry in map(fields, plane.get(4, ())):
            event = fields(entry[2][-1])
            stats: dict[str, Any] = {}
            for stat in map(fields, event.get(5, ())):
                key = names.get(stat[1][-1], "")
                if 5 in stat:
                    stats[key] = text(stat, 5)
                elif 7 in stat:
                    stats[key] = names.get(stat[7][-1], "")
                elif found := next((stat[n][-1] for n in (3, 4, 6) if n in stat), None):
                    stats[key] = found
            events[text(event, 2)] = Event(text(event, 4), stats)
    return planes
