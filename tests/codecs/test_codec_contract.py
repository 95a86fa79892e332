"""Every codec in the table keeps the contract that is shipped for codecs of others."""

from __future__ import annotations

import pytest

from asyncckpt.codecs import codecs
from asyncckpt.codecs.codecs import Blosc, Zstd
from asyncckpt.protocols import Codec
from asyncckpt.testing.contracts import CodecContract

CODECS = [
    *map(codecs.get, codecs.names()),
    Zstd(level=-7),
    Blosc(cname="lz4hc", shuffle="noshuffle", clevel=3),
    Blosc(cname="zlib", shuffle="shuffle", clevel=1, blocksize=4096),
]


def _id(codec: Codec) -> str:
    return "-".join([codec.name, *map(str, codec.to_dict().values())])


@pytest.mark.parametrize("chosen", CODECS, ids=_id, scope="class")
class TestEveryCodec(CodecContract):
    @pytest.fixture(autouse=True)
    def _choose(self, chosen: Codec) -> None:
        self._codec = chosen

    def codec(self) -> Codec:
        return self._codec
