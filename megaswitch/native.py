"""The C++ core. No other module imports `megaswitch._C`.

Data have no Python path beside it; for draws and Adafactor it is a CPU's way, as torch is a GPU's.
"""

from __future__ import annotations

from pathlib import Path

try:
    from megaswitch._C import (
        DataError,
        DocumentSampler,
        IndexedTokens,
        Loader,
        MixtureOrder,
        MixtureSampler,
        Pieces,
        PrefixDocuments,
        RowIndex,
        RowShape,
        Sampler,
        SpanDocuments,
        SpanLayout,
        SpanSampler,
        TextPairs,
        Texts,
        adafactor,
        corrupt,
        count_rows,
        draw,
        permute,
        philox4x32,
        write_rows,
    )
except ImportError as error:
    raise ImportError(
        f"the package megaswitch in '{Path(__file__).parents[1]}' has no compiled core that this "
        f"Python can load ({error}). Run `pip install -e .` there, or start from another folder if "
        "MegaSwitch is installed elsewhere: `python -m` looks into the current folder first."
    ) from error

__all__ = [
    "DataError",
    "DocumentSampler",
    "IndexedTokens",
    "Loader",
    "MixtureOrder",
    "MixtureSampler",
    "Pieces",
    "PrefixDocuments",
    "RowIndex",
    "RowShape",
    "Sampler",
    "SpanDocuments",
    "SpanLayout",
    "SpanSampler",
    "TextPairs",
    "Texts",
    "adafactor",
    "corrupt",
    "count_rows",
    "draw",
    "permute",
    "philox4x32",
    "write_rows",
]
