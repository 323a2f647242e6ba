"""Text files into documents."""

import re


def articles(lines):
    """Lines -> articles. An article begins at a heading of the first level, ' = Title = ', after a blank line."""
    article, blank = [], True
    for line in lines:
        if blank and any(map(str.strip, article)) and re.fullmatch(r" = [^=].*[^=] = \n?", line):
            yield "".join(article)
            article = []
        blank = not line.strip()
        article.append(line if line.endswith("\n") else line + "\n")
    yield "".join(article)
