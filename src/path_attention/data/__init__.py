"""Data sets: text read as bytes, and documents in tokens."""

from path_attention.data.bytes import ByteCorpus, ByteData
from path_attention.data.tokens import Files, HubDataset, TokenCorpus, TokenData, Validation

__all__ = ["ByteCorpus", "ByteData", "Files", "HubDataset", "TokenCorpus", "TokenData", "Validation"]
