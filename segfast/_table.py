"""Tables in plain text, for terminals and logs."""

from collections.abc import Collection, Sequence


def format_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], right: Collection[str] = ()
) -> str:
    """Columns as wide as their longest cell, two spaces apart; a rule under the headers.

    The columns whose headers are in `right` are aligned on the right.

    >>> print(format_table(["name", "ms"], [["conv", 1.5], ["up", 12]]))
    name  ms
    ----  ---
    conv  1.5
    up    12
    >>> print(format_table(["name", "ms"], [["conv", 1.5], ["up", 12]], right=["ms"]))
    name   ms
    ----  ---
    conv  1.5
    up     12
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    pads = [str.rjust if header in right else str.ljust for header in headers]
    padded = (
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)
