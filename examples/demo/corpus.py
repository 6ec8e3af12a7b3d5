"""English that every Python installation carries: the standard library's docstrings and pydoc's topics."""

import ast
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "turtledemo", "ensurepip"}
)
SHORTEST_PARAGRAPH = 25  # characters
LEAST_PROSE = 0.88  # share of letters, spaces and commas
HELD_OUT_SHARE = 0.05

_MARKUP = re.compile(r"[`*|]+")
_ROLE = re.compile(r":[a-z]+:(?=`)")
_RULER = re.compile(r"[=\-~^+#_.]{3,}")
_LIST_ITEM = re.compile(r"^\s*([-*o]|\d+[.)])\s+")
_TRAILING_COLONS = re.compile(r"\s*::?$")


@dataclass(frozen=True)
class Document:
    """One docstring or topic as prose, and a question that it answers."""

    question: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The documents to train on and those held out of all training."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def characters(self) -> int:
        """The length of all texts, held out or not."""
        return sum(len(document.text) for document in self.train + self.held_out)


def load_corpus(seed: int) -> Corpus:
    """Every document of the installation, each paragraph once, split by the seed."""
    documents = _without_repeats([*_docstrings(), *_topics()])
    random.Random(seed).shuffle(documents)
    cut = int(len(documents) * HELD_OUT_SHARE)
    return Corpus(train=tuple(documents[cut:]), held_out=tuple(documents[:cut]))


def _docstrings() -> Iterator[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not any(part in EXCLUDED_FOLDERS or part.startswith(("test_", "config-")) for part in parts):
            module = ".".join(part for part in parts if part != "__init__")
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # templates and files in old encodings
            yield from _documents_of(tree, module)


def _documents_of(node: ast.AST, name: str) -> Iterator[Document]:
    """The docstrings of a module, class or function and of all that it defines."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield Document(_question(node, name), clean(text))
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _documents_of(child, f"{name}.{child.name}" if named else name)


def _question(node: ast.AST, name: str) -> str:
    match node:
        case ast.Module():
            return f"What is the {name} module?"
        case ast.ClassDef():
            return f"Explain {name}."
        case _:
            return f"What does {name} do?"


def _topics() -> Iterator[Document]:
    for name, text in sorted(topics.items()):
        yield Document(f"Explain {name}.", clean(text))


def clean(text: str) -> str:
    """The prose of a docstring: its paragraphs on a line each, without code, tables and markup."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        for lines in _items(block.splitlines()):
            paragraph = _reflowed(lines)
            if len(paragraph) >= SHORTEST_PARAGRAPH and _is_prose(paragraph):
                paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _items(lines: list[str]) -> Iterator[list[str]]:
    """Splits a block before each item of a list."""
    item: list[str] = []
    for line in lines:
        if _LIST_ITEM.match(line) and item:
            yield item
            item = []
        item.append(line if item else _LIST_ITEM.sub("", line))
    yield item


def _reflowed(lines: list[str]) -> str:
    joined = " ".join(" ".join(lines).split())
    plain = _RULER.sub(" ", _MARKUP.sub("", _ROLE.sub("", joined)))
    return _TRAILING_COLONS.sub(":", " ".join(plain.split()))


def _is_prose(paragraph: str) -> bool:
    if ">>>" in paragraph or not paragraph.isascii() or len(paragraph.split()) < 4:
        return False
    prose = sum(character.isalpha() or character in " ,.'" for character in paragraph)
    return prose / len(paragraph) >= LEAST_PROSE


def _without_repeats(documents: list[Document]) -> list[Document]:
    """The library repeats itself (`_pyio`, `_pydecimal`): a paragraph read before would not be held out."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        fresh = [paragraph for paragraph in document.text.split("\n\n") if paragraph not in seen]
        seen.update(fresh)
        text = "\n\n".join(fresh)
        if text:
            kept.append(Document(document.question, text))
    return kept
