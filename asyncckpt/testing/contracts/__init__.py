"""These tests say what every codec and every store has to do; a subclass runs them with pytest alone.

``class TestMine(CodecContract)`` with the method ``codec`` tests a codec, ``class TestMine(StoreContract)`` with the
method ``store`` a storage backend.
"""

from asyncckpt.testing.contracts.codec import CodecContract
from asyncckpt.testing.contracts.store import StoreContract

__all__ = ["CodecContract", "StoreContract"]
