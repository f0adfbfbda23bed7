"""Reports in which no figure and no word is cut, whatever the width of the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_EDGE = 1
_PADDING = 3
"""Characters a column takes beside its cells: a space on either side and a rule."""


def print_sentence(console: Console, sentence: str | Text) -> None:
    """Print text (a str is markup) on one line when piped, else broken between words only."""
    text = Text.from_markup(sentence) if isinstance(sentence, str) else sentence
    if console.is_terminal:
        lines = wrap_words(text.plain, console.width)
        text = Text("\n".join(lines), style=text.style, spans=text.spans)
    console.print(text, soft_wrap=True)


def wrap_words(text: str, width: int) -> list[str]:
    """Lines of at most a width, but for words that are longer."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


class FittedTable:
    """A rich table in which no cell is cut or folded within a word.

    Headings wrap between words, and so do the cells of the leading columns. Where that is not
    enough, each row becomes a column beside the headings, in as many tables as it takes.
    """

    def __init__(self, *headings: str, title: str = "", text_columns: int = 1) -> None:
        """Make a table without rows.

        Args:
            headings: of its columns.
            title: printed above it.
            text_columns: how many columns, from the left, hold text; the others hold figures.
        """
        self._headings = headings
        self._title = title
        self._text_columns = text_columns
        self._sections: list[list[tuple[RenderableType, ...]]] = [[]]

    def add_row(self, *cells: RenderableType) -> None:
        """Add a row; strings are not markup, and cells that are missing at the end stay empty."""
        missing = len(self._headings) - len(cells)
        self._sections[-1].append((*map(_plain, cells), *[Text()] * missing))

    def add_section(self) -> None:
        """Draw a line below the rows so far."""
        self._sections.append([])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Choose the layout for the width there is."""
        rows = [row for section in self._sections for row in section]
        headings = [Text(heading, style="bold") for heading in self._headings]
        columns = [*zip(headings, *rows, strict=True)]
        needs = [
            _Need(console, options, column, wraps=number < self._text_columns)
            for number, column in enumerate(columns)
        ]
        if (widths := _share_out(needs, options.max_width)) is not None:
            yield self._upright(widths)
            return
        for number, group in enumerate(self._groups(console, options, headings, rows)):
            title = self._title if number == 0 else ""
            yield _on_its_side(console, options, headings, group, title)

    def _upright(self, widths: Sequence[int]) -> Table:
        table = Table(title=self._title or None, title_justify="left", width=_total(widths))
        for number, (heading, width) in enumerate(zip(self._headings, widths, strict=True)):
            justify: JustifyMethod = "left" if number < self._text_columns else "right"
            table.add_column(heading, width=width, justify=justify, overflow="fold")
        for section in self._sections:
            for row in section:
                table.add_row(*row)
            table.add_section()
        return table

    def _groups(
        self,
        console: Console,
        options: ConsoleOptions,
        headings: Sequence[Text],
        rows: Sequence[tuple[RenderableType, ...]],
    ) -> Iterator[list[tuple[RenderableType, ...]]]:
        """Rows that fit beside each other on their side: at least one at a time."""
        first = _Need(console, options, headings, wraps=True).least
        group: list[tuple[RenderableType, ...]] = []
        used = _EDGE + first + _PADDING
        for row in rows:
            width = _Need(console, options, row, wraps=True).least + _PADDING
            if group and used + width > options.max_width:
                yield group
                group, used = [], _EDGE + first + _PADDING
            group.append(row)
            used += width
        if group:
            yield group


class _Need:
    """Widths a column can have: the least that keeps its words whole, and the most it uses."""

    def __init__(
        self,
        console: Console,
        options: ConsoleOptions,
        cells: Sequence[RenderableType],
        *,
        wraps: bool,
    ) -> None:
        heading, *values = (Measurement.get(console, options, cell) for cell in cells)
        figures = [each.minimum if wraps else each.maximum for each in values]
        self.least = max([heading.minimum, *figures])
        self.most = max(each.maximum for each in (heading, *values))


def _plain(cell: RenderableType) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell


def _total(widths: Sequence[int]) -> int:
    return _EDGE + sum(widths) + _PADDING * len(widths)


def _share_out(needs: Sequence[_Need], width: int) -> list[int] | None:
    """A width for each column, the narrowest first served; None if words would be cut."""
    widths = [need.least for need in needs]
    spare = width - _total(widths)
    if spare < 0:
        return None
    wanting = sorted(range(len(needs)), key=lambda number: needs[number].most - widths[number])
    for served, number in enumerate(wanting):
        more = min(needs[number].most - widths[number], spare // (len(wanting) - served))
        widths[number] += more
        spare -= more
    return widths


def _on_its_side(
    console: Console,
    options: ConsoleOptions,
    headings: Sequence[Text],
    rows: Sequence[tuple[RenderableType, ...]],
    title: str,
) -> Table:
    columns = [headings, *rows]
    needs = [_Need(console, options, column, wraps=True) for column in columns]
    widths = _share_out(needs, options.max_width)
    if widths is None:  # one row with a word longer than a line, which is folded then
        names = min(needs[0].least, options.max_width // 2)
        widths = [names, max(options.max_width - _total([names, 0]), 1)]
    table = Table(title=title or None, title_justify="left", width=_total(widths))
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        justify: JustifyMethod = "right" if number else "left"
        table.add_column(column[0], width=width, justify=justify, overflow="fold")
    for cells in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*cells)
    return table
