"""
What a report is made of, beside lines of text and the figures of common/plots.py: tables, and what models wrote.

str() of a part is its markdown; reports/html.py makes a page of the same parts.
"""

from dataclasses import dataclass


@dataclass
class Table:
    header: list
    lines: list  # rows of cells
    title: str = ""  # of a table that a page shows when it is asked to

    def __str__(self):
        """Markdown that is aligned, so that it reads on a terminal too."""
        cells = [self.header, *self.lines]
        widths = [max(len(str(row[i])) for row in cells) for i in range(len(self.header))]

        def line(row):
            padded = (str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
            return "| " + " | ".join(padded) + " |"

        rule = "|" + "|".join("-" * (w + 2 if i == 0 else w + 1) + ("" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
        title = [f"## {self.title}", ""] if self.title else []
        return "\n".join([*title, line(self.header), rule, *(line(row) for row in self.lines)])


def table(header, lines):
    """The markdown of a table."""
    return str(Table(header, lines))


@dataclass
class Samples:
    """What models wrote to one prompt."""

    prompt: str
    written: list  # [(model, {how it was drawn, "" where all were alike: text})]

    def __str__(self):
        lines = [f"To the prompt *{self.prompt}*:", ""] if self.prompt else []
        for model, texts in self.written:
            lines += [f"- {', '.join(filter(None, (model, how)))}: {text}" for how, text in texts.items()]
        return "\n".join(lines)
