"""These values of Python's standard library come back as what they were: each type has a row in both tables.

``ENCODERS`` finds a row by a value's exact type, ``DECODERS`` by the tag. A tag stands for one type that this module
names itself, so that reading a file can neither import nor call anything else.
"""

from __future__ import annotations

import datetime
import io
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from asyncckpt.types import JsonValue

if TYPE_CHECKING:
    from asyncckpt.jsontree.decode import Decoder
    from asyncckpt.jsontree.encode import Encoder

_TZ_WAY_OUT: Final = "store value.astimezone(datetime.timezone.utc), and the zone's name beside it"
_PATHS: Final[dict[str, type[pathlib.PurePath]]] = {
    "Path": pathlib.Path,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
_MICROSECOND: Final = datetime.timedelta(microseconds=1)
_MAX_POSITION: Final = 1 << 62


def _path(encoder: Encoder, value: pathlib.PurePath) -> JsonValue:
    tag = type(value).__name__ if not isinstance(value, pathlib.Path) else "Path"
    return {"$": tag, "v": encoder.value(str(value))}


def _timezone(encoder: Encoder, value: datetime.timezone) -> JsonValue:
    # pickle asks for the arguments in the same way; ``tzname`` cannot tell a name that was given from one that was made
    offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]
    return {"$": "timezone", "v": [offset // _MICROSECOND, encoder.value(name[0]) if name else None]}


def _clock(encoder: Encoder, value: datetime.datetime | datetime.time) -> JsonValue:
    zone = value.tzinfo
    if zone is not None and type(zone) is not datetime.timezone:
        encoder.refuse(value, f"and time zone {zone!r:.60} cannot be stored exactly", _TZ_WAY_OUT)
    return {
        "$": type(value).__name__,
        "fold": value.fold,
        "tz": None if zone is None else encoder.value(zone),
        "v": value.replace(tzinfo=None).isoformat(),
    }


def _bytes_io(encoder: Encoder, value: io.BytesIO) -> JsonValue:
    if value.closed:
        encoder.refuse(value, "that is closed has no bytes", "save it before it is closed")
    return {"$": "BytesIO", "position": value.tell(), "v": encoder.base64(value.getbuffer())}


ENCODERS: Final[dict[type, Callable[[Any, Any], JsonValue]]] = {
    type(pathlib.Path()): _path,
    pathlib.PurePosixPath: _path,
    pathlib.PureWindowsPath: _path,
    datetime.date: lambda _, v: {"$": "date", "v": v.isoformat()},
    datetime.datetime: _clock,
    datetime.time: _clock,
    datetime.timedelta: lambda _, v: {"$": "timedelta", "v": [v.days, v.seconds, v.microseconds]},
    datetime.timezone: _timezone,
    io.BytesIO: _bytes_io,
    range: lambda e, v: {"$": "range", "v": e.items((int(v.start), int(v.stop), int(v.step)))},
    slice: lambda e, v: {"$": "slice", "v": e.items((v.start, v.stop, v.step))},
}


def _to_path(decoder: Decoder, tree: dict[str, Any]) -> pathlib.PurePath:
    text = decoder.value(tree["v"])
    if type(text) is not str:
        decoder.fail("a path that is no str")
    return _PATHS[tree["$"]](text)


def _whole(decoder: Decoder, numbers: Any, count: int) -> list[int]:
    if type(numbers) is not list or len(numbers) != count or not all(type(one) is int for one in numbers):
        decoder.fail(f"{count} whole numbers were expected")
    return numbers


def _to_timedelta(decoder: Decoder, tree: dict[str, Any]) -> datetime.timedelta:
    days, seconds, microseconds = _whole(decoder, tree["v"], 3)
    try:
        found = datetime.timedelta(days, seconds, microseconds)
    except OverflowError:
        decoder.fail("a timedelta that is too long")
    if (found.days, found.seconds, found.microseconds) != (days, seconds, microseconds):
        decoder.fail("a timedelta that is not normalised")
    return found


def _to_timezone(decoder: Decoder, tree: dict[str, Any]) -> datetime.timezone:
    offset, name = tree["v"] if type(tree["v"]) is list and len(tree["v"]) == 2 else (None, None)
    name = decoder.value(name)
    if type(offset) is not int or not (name is None or type(name) is str):
        decoder.fail("a time zone that is no offset and name")
    try:
        length = datetime.timedelta(microseconds=offset)
        return datetime.timezone(length) if name is None else datetime.timezone(length, name)
    except (ValueError, OverflowError):
        decoder.fail("a time zone that is a day or more from UTC")


def _to_date(decoder: Decoder, tree: dict[str, Any]) -> datetime.date:
    date: datetime.date = _from_iso(decoder, datetime.date, tree["v"])
    return date


def _to_clock(decoder: Decoder, tree: dict[str, Any]) -> datetime.datetime | datetime.time:
    kind = datetime.datetime if tree["$"] == "datetime" else datetime.time
    found = _from_iso(decoder, kind, tree["v"])
    zone = None if tree["tz"] is None else decoder.value(tree["tz"])
    if not (zone is None or type(zone) is datetime.timezone) or tree["fold"] not in (0, 1):
        decoder.fail("a time whose zone or fold is none")
    whole: datetime.datetime | datetime.time = found.replace(tzinfo=zone, fold=int(tree["fold"]))
    return whole


def _from_iso(decoder: Decoder, kind: Any, text: Any) -> Any:
    try:
        found = kind.fromisoformat(text)
    except (TypeError, ValueError):
        decoder.fail(f"a {kind.__name__} that is none")
    if found.isoformat() != text or getattr(found, "tzinfo", None) is not None:
        decoder.fail(f"a {kind.__name__} in another form than ISO 8601's longest")
    return found


def _to_bytes_io(decoder: Decoder, tree: dict[str, Any]) -> io.BytesIO:
    position = tree["position"]
    if type(position) is not int or not 0 <= position < _MAX_POSITION:
        decoder.fail("a position that is none")
    stream = io.BytesIO(decoder.base64(tree["v"]))
    stream.seek(position)
    return stream


def _to_range(decoder: Decoder, tree: dict[str, Any]) -> range:
    bounds = _whole(decoder, decoder.items(tree["v"]), 3)
    if bounds[2] == 0:
        decoder.fail("a range whose step is 0")
    return range(*bounds)


def _to_slice(decoder: Decoder, tree: dict[str, Any]) -> slice:
    bounds = decoder.items(tree["v"])
    if len(bounds) != 3:
        decoder.fail("a slice without three bounds")
    return slice(*bounds)


DECODERS: Final[dict[str, Callable[[Any, dict[str, Any]], Any]]] = {
    **dict.fromkeys(_PATHS, _to_path),
    "date": _to_date,
    "datetime": _to_clock,
    "time": _to_clock,
    "timedelta": _to_timedelta,
    "timezone": _to_timezone,
    "BytesIO": _to_bytes_io,
    "range": _to_range,
    "slice": _to_slice,
}
#: The fields that some tags have beside ``$`` and ``v``.
FIELDS: Final = {
    "datetime": frozenset({"fold", "tz"}),
    "time": frozenset({"fold", "tz"}),
    "BytesIO": frozenset({"position"}),
}
