"""The text that language models read, in documents of which one in ten is held out.

The two built-in texts are a real corpus that every Python machine already has: the interpreter's own standard
library, as source code, and its documentation, as English.
"""
import ast
import hashlib
import inspect
import os
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from saelib.checks import require
from saelib.files import reading

HELD_OUT_EVERY = 10
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def is_held_out(name: str) -> bool:
    """One document in ten is held out, by its name: the same ones in every run, for the model and for its SAEs."""
    return zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0


def stdlib_files(split: str, *, tests: bool = False) -> list[Path]:
    """The Python files of the interpreter's standard library that belong to `split`, "train" or "test".

    Left out: installed packages, `encodings` and `pydoc_data` (tables and English), and, unless `tests`, the
    library's own test-suites, which some distributions do not ship.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = NOT_LIBRARY if tests else NOT_LIBRARY | TEST_FOLDERS
    names = []
    for folder, inside, files in os.walk(root):
        inside[:] = set(inside) - skip  # these are not entered: installed packages are many times the library
        names += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return [root / name for name in sorted(names) if is_held_out(name) == (split == "test")]


def python_text(split: str) -> Iterator[str]:
    """The source code of the standard library, a file at a time."""
    for path in shuffled(stdlib_files(split)):
        yield path.read_text("utf8", errors="replace")


def english_text(split: str) -> Iterator[str]:
    """The English of the standard library: `help()`'s topics, and the docstrings of each file."""
    from pydoc_data.topics import topics
    yield from (text for name, text in sorted(topics.items()) if is_held_out(name) == (split == "test"))
    for path in shuffled(stdlib_files(split)):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 ships files that are broken on purpose
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
        docs = [inspect.cleandoc(doc) for node in nodes if (doc := ast.get_docstring(node, clean=False))]
        if docs:
            yield "\n\n".join(docs)


def local_text(path: Path, split: str) -> Iterator[str]:
    """Local text, every tenth document held out: files are documents or, where they are fewer than ten, blocks of lines
    between blank lines are, or else lines."""
    found = []
    for file in files_of(path):
        with reading("text", file, "be a text in UTF-8"):
            found.append(file.read_text("utf8"))
    for border in ("\n\n", "\n"):
        if len(found) < HELD_OUT_EVERY:
            found = [part for text in found for part in text.split(border) if part.strip()]
    require(len(found) >= HELD_OUT_EVERY, "text", str(path),
            f"{HELD_OUT_EVERY} files, blocks or lines or more, for one in {HELD_OUT_EVERY} is held out")
    yield from (text for i, text in enumerate(found) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "test"))


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files in a folder and below, but for hidden ones."""
    def hidden(p: Path) -> bool:
        return any(part[0] == "." for part in p.relative_to(path).parts)

    return sorted(p for p in path.rglob("*") if p.is_file() and not hidden(p)) if path.is_dir() else [path]


def is_local(text: str) -> bool:
    """Whether there is a file or a folder of that name."""
    with suppress(OSError):  # too long for one
        return Path(text).exists()
    return False


def hub_text(name: str, split: str) -> Iterator[str]:
    """A data set of the Hugging Face hub with a `text` column, streamed; one document in ten is held out."""
    require(find_spec("datasets") is not None, "text", name,
            f"one of {', '.join(map(repr, STDLIB_TEXTS))}, a local file or folder, or, with `pip install datasets`, "
            "a data set of the Hugging Face hub")
    from datasets import load_dataset
    for i, row in enumerate(load_dataset(name, split="train", streaming=True)):
        if is_held_out(str(i)) == (split == "test"):
            yield row["text"]


def documents(text: str, split: str) -> Iterator[str]:
    """The documents of a text that belong to `split`: "python", "english", a local file or folder, or a hub name."""
    if text in STDLIB_TEXTS:
        return STDLIB_TEXTS[text](split)
    return local_text(Path(text), split) if is_local(text) else hub_text(text, split)


def fingerprint(text: str) -> str:
    """What identifies a text in the cache's key: a hash of its bytes where they are here, else its name."""
    if text in STDLIB_TEXTS:
        files = [path for split in ("train", "test") for path in stdlib_files(split)]
    elif is_local(text):
        files = files_of(Path(text))
    else:
        return text
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return f"{text}:{digest.hexdigest()[:16]}"


def shuffled(items: list) -> list:
    """The items in an order that is the same in every run."""
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(0))]


STDLIB_TEXTS = {"python": python_text, "english": english_text}
