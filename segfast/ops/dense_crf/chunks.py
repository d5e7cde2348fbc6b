"""Results are computed some rows at a time: a part of the cache, and enough work for a few threads."""

_ROWS_AT_ONCE = 16384


def chunks_of(count: int) -> list[slice]:
    """The rows 0 .. count in slices that every part of the dense CRF agrees on."""
    return [slice(i, min(i + _ROWS_AT_ONCE, count)) for i in range(0, count, _ROWS_AT_ONCE)]
