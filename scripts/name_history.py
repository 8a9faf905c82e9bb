"""Check the table of names against the published wheels of transformers.

    python scripts/name_history.py --wheels FOLDER [--download]

FOLDER holds ``transformers-<version>-py3-none-any.whl`` files; `--download` fetches one of each
minor release from the package index first (about 450 MB). Nothing of them is imported: the sources
are read as syntax trees. Prints one row per name and exits with 1 if a row of the table is wrong.
"""

import argparse
import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from mnemon.names import NAMES, Message, Name, release

RELEASES = [f"4.{minor}" for minor in range(36, 58)] + [f"5.{minor}" for minor in range(24)]
Members = dict[str, dict[str, set[str]]]


class Source:
    """The sources of one release, as far as the table looks into them."""

    def __init__(self, wheel: Path) -> None:
        self.version = wheel.name.split("-")[1]
        self._archive = zipfile.ZipFile(wheel)
        self._strings: dict[str, str] = {}
        tree = ast.parse(self.text("cache_utils.py"))
        self.members, self.bases = _classes(tree)

    def text(self, path: str) -> str:
        """A file of the package; empty where this release has no such file."""
        try:
            return self._archive.read(f"transformers/{path}").decode()
        except KeyError:
            return ""

    def prints(self, message: Message) -> bool:
        """Whether the source that `message` names holds its text."""
        if message.source not in self._strings:
            tree = ast.parse(self.text(message.source))
            self._strings[message.source] = "\n".join(_strings(tree))
        return message.text in self._strings[message.source]

    def shows(self, evidence: str) -> bool:
        """Whether this release has what `evidence` names (see `mnemon.names.Name`)."""
        path, colon, text = evidence.partition(":")
        if colon:
            return text in self.text(path)
        owner, dot, member = evidence.partition(".")
        if not dot:
            return owner in self.members
        member, bracket, argument = member.rstrip(")").partition("(")
        arguments = self._find(owner, member)
        return arguments is not None and (not bracket or argument in arguments)

    def _find(self, owner: str, member: str) -> set[str] | None:
        """The arguments of a member, looked up in the class and in its bases."""
        if member in self.members.get(owner, {}):
            return self.members[owner][member]
        for base in self.bases.get(owner, []):
            found = self._find(base, member)
            if found is not None:
                return found
        return None


def _classes(tree: ast.Module) -> tuple[Members, dict[str, list[str]]]:
    members: Members = {}
    bases: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            for target in node.targets:
                if isinstance(target, ast.Name):  # an alias: class A is class B
                    members[target.id] = {}
                    bases[target.id] = [node.value.id]
        if isinstance(node, ast.ClassDef):
            bases[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]
            members[node.name] = dict(_members(node))
    return members, bases


def _members(node: ast.ClassDef) -> Iterator[tuple[str, set[str]]]:
    for item in ast.walk(node):
        if isinstance(item, ast.FunctionDef):
            spec = item.args
            named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
            yield item.name, {a.arg for a in [*named, spec.vararg, spec.kwarg] if a is not None}
        elif isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store):
            if isinstance(item.value, ast.Name) and item.value.id == "self":
                yield item.attr, set()
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id, set()


def _strings(tree: ast.Module) -> Iterator[str]:
    """The texts in a source, with ``...`` where a formatted one has a value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
            yield "".join(str(part) for part in parts)


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for version in track(RELEASES, "downloading"):
        if not list(folder.glob(f"transformers-{version}.*.whl")):
            wanted = ["--no-deps", "--only-binary=:all:", f"transformers=={version}.*"]
            command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *wanted]
            subprocess.run(command, check=True)


def _wrong(name: Name, sources: list[Source]) -> list[str]:
    """Releases in which the table and the source disagree."""
    return [
        f"{source.version} {'has' if has else 'has not'}"
        for source in sources
        if (has := any(source.shows(evidence) for evidence in name.evidence))
        != name.there_in(source.version)
    ]


def _never_printed(name: Name, sources: list[Source]) -> list[str]:
    """Messages of the table that no release has in the file that is said to print them."""
    quoted = [message for message in name.messages if message.source]
    return [
        f"no release prints: {message.text}"
        for message in quoted
        if not any(source.prints(message) for source in sources)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="fetch the wheels first")
    options = parser.parse_args()
    if options.download:
        _download(options.wheels)
    wheels = sorted(options.wheels.rglob("transformers-*.whl"))
    if not wheels:
        parser.error(f"no transformers-*.whl under {options.wheels}; try --download")
    sources = sorted((Source(w) for w in wheels), key=lambda s: release(s.version))
    table = Table("name", "table says", f"{len(sources)} releases say", title="which name when")
    failed = 0
    for name in NAMES:
        says = ", ".join(f"{first} - {last or 'today'}" for first, last in name.lived)
        wrong = _wrong(name, sources) if name.evidence else []
        wrong += _never_printed(name, sources)
        failed += bool(wrong)
        right = "right" if name.evidence else "not in the source: the tests run it"
        verdict = escape("; ".join(wrong)) or right
        table.add_row(escape(name.key), says, verdict)
    Console(width=140).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
