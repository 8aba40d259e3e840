"""Tables that fit the console they are printed on."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_UNBOUNDED = 10_000


def plain_table(title: str, *, show_footer: bool = False) -> Table:
    """Return an empty table in the one style of kroncc."""
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=show_footer, pad_edge=False
    )


@dataclass(frozen=True)
class Fitting:
    """The same table laid out in several ways, widest first: the first that fits is printed, else the last.

    `least` is the width in columns from which the first one does, though its text then folds; without it,
    every layout needs its full width.
    """

    layouts: tuple[Table, ...]
    least: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the layout for the width that there is."""
        if self.least is not None and options.max_width >= self.least:
            yield self.layouts[0]
            return
        tried = self.layouts[:-1] if self.least is None else self.layouts[1:-1]
        free = options.update(max_width=_UNBOUNDED)
        fits = (
            table for table in tried if Measurement.get(console, free, table).maximum <= options.max_width
        )
        yield next(fits, self.layouts[-1])
