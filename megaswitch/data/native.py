"""The C++ data core. No other module imports `megaswitch._C`; there is no Python path beside it."""

from __future__ import annotations

from megaswitch._C import (
    DataError,
    IndexedTokens,
    SpanLayout,
    SpanSampler,
    corrupt,
    permute,
    philox4x32,
)

__all__ = [
    "DataError",
    "IndexedTokens",
    "SpanLayout",
    "SpanSampler",
    "corrupt",
    "permute",
    "philox4x32",
]
