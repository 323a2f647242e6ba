"""
Two kinds of parts of a report: tables, and samples of text. (The others are lines of text and the figures of common/plots.py.)

str() of a part is its markdown; reports/html.py makes a page from the same parts.
"""

from dataclasses import dataclass


@dataclass
class Table:
    header: list
    lines: list  # rows of cells
    title: str = ""  # if given, the page shows the table folded

    def __str__(self):
        """Aligned markdown, readable on a terminal too."""
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
    """Texts that models wrote to one prompt."""

    prompt: str
    written: list  # [(model, {how the text was sampled, "" if all were sampled alike: text})]

    def __str__(self):
        lines = [f"To the prompt *{self.prompt}*:", ""] if self.prompt else []
        for model, texts in self.written:
            lines += [f"- {', '.join(filter(None, (model, how)))}: {text}" for how, text in texts.items()]
        return "\n".join(lines)
