"""Notebooks: changed lines are written anew, everything else stays byte for byte."""

import json

import pytest

from mnemon.migrate import FileResult, Status, Target
from mnemon.migrate.notebook import migrate_notebook

IMPORT = "from transformers import DynamicCache\n"


def notebook(*cells: object, **metadata: object) -> dict[str, object]:
    made = [
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": source,
        }
        for source in cells
    ]
    text = {"cell_type": "markdown", "metadata": {}, "source": ["cache.seen_tokens ü"]}
    return {"cells": [text, *made], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def migrate(content: bytes) -> FileResult:
    return migrate_notebook(content, Target("5.23"), "a.ipynb")


@pytest.mark.parametrize(
    ("indent", "ascii_only", "end"),
    [(1, False, "\n"), (2, True, ""), (None, False, "\n"), ("\t", True, "\n")],
)
def test_only_the_changed_line_changes(indent: object, ascii_only: bool, end: str) -> None:
    lines = [IMPORT, "c = DynamicCache()\n", 'print("ä", c.seen_tokens)\n', "x = 'é'"]
    made = notebook(lines, ["c.crop(-1)"])
    text = json.dumps(made, indent=indent, ensure_ascii=ascii_only) + end  # type: ignore[arg-type]
    result = migrate(text.encode())
    assert not result.problems
    expected = json.loads(text)
    expected["cells"][1]["source"][2] = 'print("ä", c.get_seq_length())\n'
    assert result.after.decode() == (
        json.dumps(expected, indent=indent, ensure_ascii=ascii_only) + end  # type: ignore[arg-type]
    )
    again = migrate(result.after)
    assert again.after == result.after


def test_sources_that_are_one_string() -> None:
    text = json.dumps(notebook(f"{IMPORT}c = DynamicCache()", "n = c.seen_tokens"))
    result = migrate(text.encode())
    cells = json.loads(result.after)["cells"]
    assert cells[2]["source"] == "n = c.get_seq_length()"
    finding = result.of(Status.REWRITTEN)[0]
    assert (finding.place.cell, finding.place.line, finding.place.column) == (3, 1, 5)


def test_what_was_learned_in_one_cell_holds_in_the_next() -> None:
    made = notebook([IMPORT, "c = DynamicCache()"], ["for k, v in c:\n", "    pass"])
    cells = json.loads(migrate(json.dumps(made).encode()).after)["cells"]
    assert cells[2]["source"][0].startswith("for k, v in ((layer.keys")


def test_magics_and_other_languages_are_left_alone() -> None:
    made = notebook(
        ["%%bash\n", "echo cache.seen_tokens"],
        [
            "%matplotlib inline\n",
            "!pip install transformers\n",
            IMPORT,
            "files = !ls\n",
            "DynamicCache?\n",
        ],
        ["%time c = DynamicCache()\n", "c = DynamicCache()\n", "await f(c.seen_tokens)"],
    )
    result = migrate(json.dumps(made).encode())
    assert not result.problems
    cells = json.loads(result.after)["cells"]
    assert cells[:3] == json.loads(json.dumps(made))["cells"][:3]
    assert cells[3]["source"][0] == "%time c = DynamicCache()\n"
    assert cells[3]["source"][2] == "await f(c.get_seq_length())"


def test_a_cell_that_is_no_python_is_reported_and_the_rest_goes_on() -> None:
    made = notebook([IMPORT, "c = DynamicCache()"], ["def f(:"], ["c.seen_tokens"])
    result = migrate(json.dumps(made).encode())
    assert [problem.place.cell for problem in result.problems if problem.place] == [3]
    assert json.loads(result.after)["cells"][3]["source"] == ["c.get_seq_length()"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"transformers seen_tokens": 1',
        b"[1, 'transformers seen_tokens']",
        b'["transformers", "seen_tokens"]',
        b"\xff transformers seen_tokens",
    ],
)
def test_what_is_no_notebook_is_said(content: bytes) -> None:
    result = migrate(content)
    assert result.after == content
    assert result.problems


def test_an_r_notebook_is_left() -> None:
    made = notebook(["transformers seen_tokens <- 1"], language_info={"name": "R"})
    content = json.dumps(made).encode()
    assert migrate(content).after == content
    assert not migrate(content).problems
