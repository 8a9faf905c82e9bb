"""One file from bytes to bytes: look, decide, edit, and check what came out."""

from __future__ import annotations

import ast
import re
import warnings

from mnemon.migrate import loading, names_imported, statements
from mnemon.migrate.book import Book, Decision
from mnemon.migrate.edit import Edit, Rendered, Splice, render, span
from mnemon.migrate.flow import Flow
from mnemon.migrate.model import FileResult, Finding, Place, Problem, Replacement, Status
from mnemon.migrate.rules import RULES
from mnemon.migrate.target import Target
from mnemon.migrate.text import Source, decode

__all__ = ["Change", "Piece", "is_candidate", "migrate_source", "migrate_text", "spliced"]

_VAGUE = {"past", "cache", "update", "getattr", "hasattr", "setattr", "delattr"}
# A file without one of these has nothing to migrate and is not even parsed.
_WORDS = re.compile(
    b"|".join(
        re.escape(word.encode())
        for word in sorted({*loading.WORDS, *(w for rule in RULES for w in rule.words)} - _VAGUE)
    )
)
_OURS = re.compile(rb"transformers|past_key_value|modeling_utils|modeling_outputs|generation")
# Layers of four tensors. `encoder_hidden_states` alone may be a decoder that can also be one half.
_ENCODER = re.compile(
    rb"\bEncoderDecoderCache\b|\bencoder_outputs\b|past_key_values?\[(?:-?2\b|3\b|:2\b|0\]\[[23])"
)
_KEPT = re.compile(r"#\s*mnemon:\s*keep\b")

Piece = tuple[int, int, bytes]
Change = tuple[list[Finding], list[Piece]]


def is_candidate(content: bytes) -> bool:
    """Whether a file can hold anything to migrate."""
    return _WORDS.search(content) is not None and _OURS.search(content) is not None


def migrate_source(content: bytes, target: Target, path: str = "<source>") -> FileResult:
    """Migrate one Python file.

    Args:
        content: the file's bytes, in any encoding that Python reads.
        target: the release that the code should run under.
        path: what to call it in the result.

    Returns:
        The new bytes and every finding; the same bytes where there is nothing to rewrite. A file
        that is not Python comes back with a problem.
    """
    result = FileResult(path=path, before=content, after=content)
    result.num_lines = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
    if not is_candidate(content):
        return result
    try:
        source = decode(content)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        result.problems.append(Problem(message=f"cannot be decoded: {error}"))
        return result
    try:
        found, pieces = migrate_text(source, target, path)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        result.problems.append(_problem(error))
        return result
    result.findings = found
    if pieces:
        result.after = source.encode(spliced(source.utf8, pieces))
    return result


def _problem(error: Exception) -> Problem:
    if isinstance(error, SyntaxError) and error.lineno:
        line, column = error.lineno, max(1, error.offset or 1)
        place = Place(line=line, column=column, end_line=line, end_column=column)
        return Problem(message=f"not Python as this interpreter reads it: {error.msg}", place=place)
    return Problem(message=f"cannot be read as Python: {str(error) or type(error).__name__}")


def parse(utf8: bytes, path: str = "<source>", *, notebook: bool = False) -> ast.Module:
    """Parse source text; a notebook's cells may await at their top."""
    flags = ast.PyCF_ONLY_AST | (ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if notebook else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's "\d" is not our business
        tree = compile(utf8.decode("utf-8"), path, "exec", flags, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    return tree


def migrate_text(source: Source, target: Target, path: str, *, notebook: bool = False) -> Change:
    """Findings of a text, and (start, end, new text) of its rewrites, in bytes.

    Raises:
        SyntaxError, ValueError: it is not Python.
    """
    tree = parse(source.utf8, path, notebook=notebook)
    book, flow = _decide(source, tree, target, set())
    tuple_functions = statements.tuple_functions(flow)
    if tuple_functions:  # inside these it is a tuple once a cache was turned into one
        book, flow = _decide(source, tree, target, set(tuple_functions))
    decisions = book.all()
    others = loading.find(source, flow, is_old=book.is_old(decisions))
    if not decisions and not book.imports and not others:
        return [], []
    kept = _lines_kept(source)
    replaced = [found for found in book.statements.values() if found[0].lineno not in kept]
    decisions = [
        found
        for found in decisions
        if found.node.lineno not in kept and not book.is_replaced(found.node)
    ]
    findings, rendered = _edit(source, decisions)
    pairs = names_imported.finish(source, tree, book, target, path)
    pairs += statements.replaced(source, tree, replaced)
    pairs += statements.normalised(source, flow, tuple_functions)
    pairs = [pair for pair in pairs if pair[0].place.line not in kept]
    others = [pair for pair in others if pair[0].place.line not in kept]
    findings += [finding for finding, _ in (*pairs, *others)]
    pairs += [(finding, splice) for finding, splice in others if splice is not None]
    splices: dict[tuple[int, int], Splice] = {}
    for _, splice in pairs:
        key = (splice.start, splice.end)
        before = splices[key].text if key in splices and splice.start == splice.end else b""
        splices[key] = Splice(splice.start, splice.end, before + splice.text)
    pieces = [(part.start, part.end, part.text) for part in rendered]
    pieces += [(part.start, part.end, part.text) for part in splices.values()]
    if pieces:  # what does not parse is never written
        parse(spliced(source.utf8, pieces), path, notebook=notebook)
    return sorted(findings, key=lambda f: (f.place.line, f.place.column)), pieces


def _decide(
    source: Source, tree: ast.Module, target: Target, normalised: set[int]
) -> tuple[Book, Flow]:
    book = Book(tree, RULES)
    book.is_encoder_decoder = _ENCODER.search(source.utf8) is not None
    book.normalised = normalised
    flow = Flow(tree, target, book)
    flow.run()
    return book, flow


def _lines_kept(source: Source) -> set[int]:
    """Lines that say `# mnemon: keep`."""
    if b"mnemon:" not in source.utf8:
        return set()
    lines = re.split(r"\r\n|\r|\n", source.utf8.decode("utf-8"))
    return {at for at, line in enumerate(lines, 1) if _KEPT.search(line)}


def _edit(source: Source, decisions: list[Decision]) -> tuple[list[Finding], list[Rendered]]:
    edits: dict[int, Edit] = {}
    for decision in decisions:
        if decision.edited is None or decision.transform is None:
            continue
        edit = edits.setdefault(id(decision.edited), Edit(node=decision.edited))
        edit.transforms.append(decision.transform)
        edit.loose |= decision.loose
    rendered: list[Rendered] = []
    try:
        rendered = list(render(source, list(edits.values())))
    except ValueError:
        rendered = _one_by_one(source, list(edits.values()))
    where = {node: found for found in rendered for node in found.nodes}
    findings: list[Finding] = []
    seen: set[tuple[str, Place, str]] = set()
    for decision in decisions:
        finding = _finding(source, decision, where)
        key = (finding.rule, finding.place, finding.status)
        if key not in seen:
            seen.add(key)
            findings.append(finding)
    return findings, rendered


def _one_by_one(source: Source, edits: list[Edit]) -> list[Rendered]:
    """What can be placed, where something cannot; nested edits stand or fall together."""
    placed = sorted(edits, key=lambda e: (span(source, e.node)[0], -span(source, e.node)[1]))
    groups: list[list[Edit]] = []
    end = -1
    for edit in placed:
        start, stop = span(source, edit.node)
        if start >= end:
            groups.append([])
            end = stop
        groups[-1].append(edit)
    found: list[Rendered] = []
    for group in groups:
        try:
            found += render(source, group)
        except ValueError:
            continue
    return found


def _finding(source: Source, decision: Decision, where: dict[int, Rendered]) -> Finding:
    place = place_of(source, decision.node)
    rendered = where.get(id(decision.edited)) if decision.edited is not None else None
    if decision.edited is not None and rendered is None:
        reason = "it stands inside an f-string that this Python cannot place; take it out of there"
        return Finding(rule=decision.rule, status=Status.UNDECIDED, place=place, message=reason)
    replacement = None
    if rendered is not None:
        replacement = Replacement(
            place=between(source, rendered.start, rendered.end), text=rendered.text.decode()
        )
    return Finding(
        rule=decision.rule,
        status=decision.status,
        place=place,
        message=decision.message,
        replacement=replacement,
    )


def place_of(source: Source, node: ast.expr | ast.stmt) -> Place:
    """Where `node` stands; of a function its first line only."""
    start, end = span(source, node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        end = source.offset(node.lineno, node.col_offset) + len("def ") + len(node.name.encode())
        end += len("async ") if isinstance(node, ast.AsyncFunctionDef) else 0
    return between(source, start, end)


def between(source: Source, start: int, end: int) -> Place:
    """The place of the bytes from `start` to `end`."""
    line, column = source.position(start)
    end_line, end_column = source.position(end)
    return Place(line=line, column=column, end_line=end_line, end_column=end_column)


def spliced(utf8: bytes, pieces: list[Piece]) -> bytes:
    """`utf8` with the pieces put in."""
    for start, end, text in sorted(pieces, reverse=True):
        utf8 = utf8[:start] + text + utf8[end:]
    return utf8
