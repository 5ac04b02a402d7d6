"""Data sets: text read as bytes."""

from path_attention.data.bytes import ByteCorpus, ByteData

__all__ = ["ByteCorpus", "ByteData"]
