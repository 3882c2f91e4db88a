"""Links and sizes in an HDF5 file, checked before anything is read into memory.

A model of thousands of layers has tens of thousands of groups and arrays, and HDF5 takes seconds
to open each. So it only walks the links, and an array's header is read here: where it shows that
the numbers lie in the file, one after the other, the array need not be opened. Whatever looks
unusual is left to HDF5.

References:
    - HDF5 file format specification, version 3.0, II.A (superblock 0) and IV.A (object headers).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h5py  # type: ignore[import-untyped]

from frostline.data.reading import require_memory
from frostline.types import ModelError

#: A compressed block of HDF5 shrinks this far at most.
_DEFLATE_LIMIT = 1032
_COMPRESSING = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SZIP, h5py.h5z.FILTER_LZF}
#: HDF5 walks groups by recursion, and Keras the models in them.
_DEEPEST = 200
#: In place of a size: it is a group.
_GROUP = -1

#: How a file begins that has a superblock of version 0, with addresses and sizes of 8 bytes.
_SUPERBLOCK = b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0"
#: An object's header, version 1: version, number of messages, references, bytes of all messages.
_HEADER = struct.Struct("<BxHII4x")
#: What stands before a message: its kind, its bytes, its flags.
_MESSAGE = struct.Struct("<HHB3x")
_NOTHING, _SPACE, _TYPE, _FILL, _LAYOUT, _SYMBOLS, _CHANGED = 0, 1, 3, 5, 8, 17, 18
_SHARED = 2
#: Bytes of a header that are looked at. One with attributes may have more, and is left to HDF5.
_LONGEST = 512


@dataclass(frozen=True)
class Stored:
    """The bytes of an HDF5 file.

    Attributes:
        read: Returns bytes: from which on, and how many at most.
        size: How many there are.
    """

    read: Callable[[int, int], bytes]
    size: int


def check_weights(file: Any, stored: Stored, shown: str) -> None:
    """Refuse links to other places, and arrays larger than what is stored or what fits.

    Args:
        file: The open file, an ``h5py.h5f.FileID``.
        stored: Its bytes.
        shown: What errors call it.

    Raises:
        ModelError: One of these; also groups that contain themselves, or are nested too deeply.
    """
    root = h5py.h5g.open(file, b"/")
    groups = {h5py.h5o.get_info(root).addr}
    plain = stored.read(0, len(_SUPERBLOCK)) == _SUPERBLOCK and not any(stored.read(24, 8))
    hard, total = h5py.h5l.TYPE_HARD, 0
    refused: list[Exception] = []

    def check(name: bytes, link: Any) -> None:
        nonlocal total
        size = None
        if link.type == hard and plain:
            size = _within(stored, link.u)
            if size is not None and size >= 0:
                total += size
                return
        named = f"{shown}: {name.decode(errors='backslashreplace')!r}"
        if link.type != hard:
            raise ModelError(f"{named} is a link to another place, and is not read")
        if size is None:
            size = _declared(h5py.h5o.open(root, name), stored, named)
        if size != _GROUP:
            total += size
        elif link.u in groups:
            raise ModelError(f"{named} is a group inside itself")
        elif name.count(b"/") >= _DEEPEST:
            raise ModelError(f"{named:.80}: groups are nested too deeply; at most {_DEEPEST}")
        else:
            groups.add(link.u)

    def noted(name: bytes, link: Any) -> bool | None:
        try:
            check(name, link)
        except Exception as error:  # not through HDF5's walk, which would add words of its own
            refused.append(error)
        return True if refused else None  # anything but None ends the walk

    root.links.visit(noted, info=True)
    if refused:
        raise refused[0]
    require_memory(total, f"{shown}: its weights", kind=ModelError)


def _within(stored: Stored, address: int) -> int | None:
    """Bytes that an array declares and has, ``_GROUP`` for a group; ``None``: HDF5 must tell."""
    head = stored.read(address, _LONGEST)
    if len(head) < _HEADER.size:
        return None
    version, count, _, length = _HEADER.unpack_from(head)
    end = _HEADER.size + length
    if version != 1 or end > len(head):
        return None
    messages: dict[int, int] = {}
    place, seen = _HEADER.size, 0
    while place + _MESSAGE.size <= end:
        kind, size, flags = _MESSAGE.unpack_from(head, place)
        place += _MESSAGE.size
        seen += 1
        if kind in (_SPACE, _TYPE, _LAYOUT, _SYMBOLS):
            if kind in messages:
                return None
            messages[kind] = place
        elif kind not in (_NOTHING, _FILL, _CHANGED):  # filters, other files, more of the header
            return None
        if flags & _SHARED:
            return None
        place += size
    if seen != count or place != end:
        return None
    if messages.keys() == {_SYMBOLS}:
        return _GROUP
    if messages.keys() != {_SPACE, _TYPE, _LAYOUT}:
        return None
    space, layout = messages[_SPACE], messages[_LAYOUT]
    rank, numbers = head[space + 1], head[messages[_TYPE]] in (0x10, 0x11)  # integers, floats
    # A space of version 1 with sizes alone or with their limits; a layout of version 3 in a piece.
    if head[space] != 1 or not numbers or head[layout : layout + 2] != b"\x03\x01":
        return None
    if space + 8 + 8 * rank > end or layout + 18 > end:
        return None
    shape = struct.unpack_from(f"<{rank}Q", head, space + 8)
    (item,) = struct.unpack_from("<I", head, messages[_TYPE] + 4)
    start, there = struct.unpack_from("<QQ", head, layout + 2)
    declared = math.prod(shape) * item
    return declared if declared <= there and start + there <= stored.size else None


def _declared(value: Any, stored: Stored, shown: str) -> int:
    """The same of an object that HDF5 has opened.

    Raises:
        ModelError: It lies in another file, or declares more than is stored.
    """
    if isinstance(value, h5py.h5g.GroupID):
        return _GROUP
    if not isinstance(value, h5py.h5d.DatasetID):
        return 0
    made = value.get_create_plist()
    if made.get_external_count() or made.get_layout() == h5py.h5d.VIRTUAL:
        raise ModelError(f"{shown} lies in another file, and is not read")
    space = value.get_space()
    if space.get_simple_extent_type() == h5py.h5s.NULL:
        return 0
    declared = int(math.prod(space.shape) * value.get_type().get_size())
    there = min(int(value.get_storage_size()), stored.size)
    if declared > there:
        filters = {made.get_filter(place)[0] for place in range(made.get_nfilters())}
        if declared > there * (_DEFLATE_LIMIT if filters & _COMPRESSING else 1):
            raise ModelError(f"{shown} declares {declared} bytes and holds {there}")
    return declared
