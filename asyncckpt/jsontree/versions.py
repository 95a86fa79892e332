"""Trees that hold nothing but what the first readers know are of version 1; the kinds of values that came later are of
version 4, and a reader that does not know them must not take them for damage."""

from __future__ import annotations

from typing import Final

from asyncckpt.jsontree import standard_values, typed_values, wrapper_tensors

_MARK: Final = b'{"$":"'
#: Text in JSON has its quotes escaped, so that nothing but a tag looks like this.
_SINCE_4: Final = (
    *(
        f'{tag}"'.encode()
        for tag in sorted({*standard_values.DECODERS, *typed_values.TAGS, "object", wrapper_tensors.TAG})
    ),
    *(
        f'{tag}","dtype":"{code}'.encode()
        for tag in ("numpy", "ndarray")
        for code in ("U", "S", "<U", ">U", "|S", "<m", ">m", "<M", ">M")
    ),
)


def version_of(text: bytes) -> int:
    """Return the oldest format version that knows every tag in a text that ``dumps`` made. Takes a few microseconds for
    each thousand tags."""
    at = text.find(_MARK)
    while at >= 0:
        at += len(_MARK)
        if text.startswith(_SINCE_4, at):
            return 4
        at = text.find(_MARK, at)
    return 1
