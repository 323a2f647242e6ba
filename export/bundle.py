"""
Builds one file from the repository's modules: only the definitions that a class needs, with their comments.

So an exported model carries the same code that surgery runs, and nobody has to write it twice.
"""

import ast
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Replacements. fail() ends the program, which imported code must not do. Compiled loops need kernels.c and a compiler.
REPLACED = {
    ("common.cli", "fail"): "def fail(message):\n    raise ValueError(message)",
    ("kernels.build", "bind"): "def bind(name, *first):\n    return None  # torch alone, without a C compiler",
}


class Module:
    """A module's source, split by top-level names."""

    def __init__(self, name):
        self.name = name
        text = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        self.lines, self.defined, self.ours, self.imports = text.splitlines(), {}, {}, {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign):
                names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
                self.defined |= dict.fromkeys(names, node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self.note_import(node)

    def note_import(self, node):
        for alias in node.names:
            name = alias.asname or alias.name
            if isinstance(node, ast.ImportFrom) and is_ours(node.module):
                self.ours[name] = node.module
            else:
                start = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                self.imports[name] = f"{start}import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")

    def source(self, node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(self.lines[first - 1 : node.end_lineno])


@lru_cache
def module(name):
    return Module(name)


def is_ours(name):
    return (ROOT / (name.replace(".", "/") + ".py")).is_file()


class Bundle:
    def __init__(self):
        self.imports, self.done, self.texts, self.modules = set(), {}, [], {}

    def add(self, where, name):
        """Add a definition of a module, after the definitions that it needs."""
        if name in self.done:
            if self.done[name] != where:
                raise ValueError(f"{name} is defined in {self.done[name]} and in {where}: rename one of them")
            return
        self.done[name], found = where, module(where)
        if (where, name) in REPLACED:
            self.texts.append(REPLACED[where, name])
            return
        node = found.defined[name]
        for used in dict.fromkeys(n.id for n in ast.walk(node) if isinstance(n, ast.Name)):
            if used in found.defined and found.defined[used] is not node:
                self.add(where, used)
            elif used in found.ours:
                self.add(found.ours[used], used)
            elif used in found.imports:
                self.imports.add(found.imports[used])
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and is_ours(inner.module):
                raise ValueError(f"{where}.{name} imports {inner.module} inside: move the import to the top")
        self.modules[where] = True
        self.texts.append(found.source(node))


def bundle(where, name, head, imports, tail):
    """The text of a Python file: a docstring that begins with `head`, imports, definitions in order of need, `tail`."""
    made = Bundle()
    made.add(where, name)
    made.imports |= {*imports}
    plain = sorted(line for line in made.imports if line.startswith("import "))
    named = sorted(made.imports - {*plain})
    sources = "\n".join(sorted(f"- {module.replace('.', '/')}.py" for module in made.modules))
    head = f'"""\n{head}\n\nParts of nanoPCA, MIT licence:\n{sources}\n"""'
    return "\n\n\n".join([f"{head}\n\n" + "\n".join([*plain, *named]), *made.texts, tail]) + "\n"
