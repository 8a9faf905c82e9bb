"""The corpus: deterministic, free of values of this machine, and split by name alone."""

from pathlib import Path

import pytest

from mnemon.errors import ZooError
from mnemon.zoo import corpus


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return corpus.load_documents()


def test_split_is_disjoint_and_complete(documents: list[corpus.Document]) -> None:
    train, held_out = corpus.split(documents)
    names = {document.name for document in train}, {document.name for document in held_out}
    assert not names[0] & names[1]
    assert len(train) + len(held_out) == len(documents)
    assert 0.02 < len(held_out) / len(documents) < 0.10


def test_split_depends_on_the_name_alone() -> None:
    assert corpus.is_held_out("ast.py")
    assert not corpus.is_held_out("json/decoder.py")


def test_names_are_unique_and_kinds_are_all_there(documents: list[corpus.Document]) -> None:
    names = [document.name for document in documents]
    assert len(set(names)) == len(names)
    assert {"json/decoder.py", "topics/yield", "builtin/builtins"} <= set(names)
    assert not any({"test", "site-packages"} & set(name.split("/")[:-1]) for name in names)


def test_help_texts_tell_nothing_of_this_machine(documents: list[corpus.Document]) -> None:
    for document in documents:
        if document.name.startswith("builtin/"):
            assert " at 0x" not in document.text
            assert str(Path.home()) not in document.text


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no Python sources"):
        corpus.load_documents(tmp_path)


def test_summary_counts_bytes_of_both_parts() -> None:
    documents = [corpus.Document("ast.py", "é"), corpus.Document("json/decoder.py", "abc")]
    summary = corpus.summarise(documents)
    assert (summary.held_out_bytes, summary.train_bytes) == (2, 3)
    assert (summary.num_documents, summary.num_held_out) == (2, 1)
