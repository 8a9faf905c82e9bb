"""The text the bundled model is trained on: the running Python's library and its documentation.

Nothing is downloaded. A document is named by its path relative to the library
(``json/decoder.py``), or by ``topics/NAME`` (the language reference as pydoc ships it)
and ``builtin/NAME`` (the docstrings of a module written in C). The name alone decides
whether the document is held out, so the split is the same on every machine that has
the same Python.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mnemon.errors import ZooError

EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "config",
        "ensurepip",
        "idle_test",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
HELD_OUT_ONE_IN = 20


class Document(NamedTuple):
    """One text of the corpus."""

    name: str
    text: str


class CorpusSummary(NamedTuple):
    """What a model card says about the text that was used."""

    python_version: str
    num_documents: int
    num_held_out: int
    train_bytes: int
    held_out_bytes: int
    names_sha256: str
    text_sha256: str


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept from the tokenizer and from training.

    Args:
        name: the document's name, with forward slashes.

    Returns:
        True for about one name in `HELD_OUT_ONE_IN`, by the SHA-256 of the name.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _wanted(relative: Path) -> bool:
    if any(part in EXCLUDED_FOLDERS or part.startswith("config-") for part in relative.parts[:-1]):
        return False
    if relative.parts[0] == "encodings" and relative.name.startswith(("cp", "iso", "mac_", "koi")):
        return False  # tables of code points, not prose or code
    return not relative.name.startswith("_sysconfigdata")


def _source_documents(stdlib: Path) -> Iterator[Document]:
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if not _wanted(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(relative.as_posix(), text.replace("\r\n", "\n"))


def _documentation_documents() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])
    for name in sorted(sys.builtin_module_names):
        if name in {"__main__"}:
            continue
        yield Document(f"builtin/{name}", _docstrings(name))


def _docstrings(module_name: str) -> str:
    """The docstrings of a module written in C: never its values, which tell of the machine."""
    module = importlib.import_module(module_name)
    parts = [f"{module_name}\n\n{inspect.getdoc(module)}"]
    for name, value in sorted(vars(module).items()):
        if not (inspect.isclass(value) or inspect.isbuiltin(value)):
            continue
        parts.append(f"{module_name}.{name}\n\n{inspect.getdoc(value)}")
        if inspect.isclass(value) and value.__module__ in {module_name, "builtins"}:
            for attribute, member in sorted(vars(value).items()):
                if inspect.isroutine(member) and not attribute.startswith("_"):
                    parts.append(f"{value.__name__}.{attribute}\n\n{inspect.getdoc(member)}")
    return "\n\n".join(parts) + "\n"


def load_documents(stdlib: Path | None = None) -> list[Document]:
    """Read the whole corpus, in a fixed order.

    Args:
        stdlib: the library's folder; the running interpreter's when None.

    Returns:
        The documents, sources first, each kind sorted by name.

    Raises:
        ZooError: the folder holds no Python sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    documents = list(_source_documents(folder))
    if not documents:
        raise ZooError(
            f"no Python sources under the standard library's folder (got {folder.name!r}); "
            "use an interpreter installed with its .py files"
        )
    if stdlib is None:
        documents.extend(_documentation_documents())
    return documents


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Divide documents into (training, held-out) by `is_held_out`, keeping their order."""
    train = [document for document in documents if not is_held_out(document.name)]
    held_out = [document for document in documents if is_held_out(document.name)]
    return train, held_out


def summarise(documents: list[Document]) -> CorpusSummary:
    """Count and fingerprint a corpus for the model card."""
    train, held_out = split(documents)
    names = hashlib.sha256("\n".join(document.name for document in documents).encode())
    text = hashlib.sha256()
    for document in documents:
        text.update(document.text.encode())
    return CorpusSummary(
        python_version=".".join(map(str, sys.version_info[:3])),
        num_documents=len(documents),
        num_held_out=len(held_out),
        train_bytes=sum(len(document.text.encode()) for document in train),
        held_out_bytes=sum(len(document.text.encode()) for document in held_out),
        names_sha256=names.hexdigest(),
        text_sha256=text.hexdigest(),
    )
