"""Print the page "which name when" (docs/names.md) from mnemon's table of names.

python scripts/names_page.py            # write docs/names.md
python scripts/names_page.py --check    # exit with 1 if the page is not what the table says
"""

import argparse
import sys
from pathlib import Path

from mnemon.names import NAMES, Kind, Name

PAGE = Path(__file__).parents[1] / "docs" / "names.md"
RELEASES = ("4.36", "4.44", "4.49", "4.53", "4.57", "5.0", "5.4", "5.14", "5.20", "5.23")
INTRODUCTION = """\
# Which name when

transformers' cache API changed under its users' feet. This page says which name lived in which
release, what to write today, and what each error message means. It is printed from the table that
mnemon itself works by (`src/mnemon/names`): `python scripts/names_page.py`. The releases were read
in the published wheels: `python scripts/name_history.py --wheels FOLDER --download`.

Three ways out:

- `mnemon migrate FILE` rewrites code to the modern names ([migrate.md](migrate.md)).
- `with mnemon.legacy.enable():` brings the old names back while code you cannot change runs
  ([legacy.md](legacy.md)).
- `mnemon.Cache.from_legacy(tuples)` and `cache.to_legacy()` convert, without either.
"""


def code(text: str) -> str:
    """`text` as inline code inside a table; a bar would end the cell."""
    return "`" + text.replace("|", "\\|") + "`"


def lived(name: Name) -> str:
    spans = [
        f"{first} and later" if last is None else first if first == last else f"{first} to {last}"
        for first, last in name.lived
    ]
    return "; ".join(spans)


def page() -> str:
    """The whole page, as Markdown."""
    parts = [INTRODUCTION, "## At a glance\n", *_glance(), "## Search your error message\n"]
    parts += _messages()
    parts += ["## Wrong without an error\n", *_silent(), "## Name by name\n"]
    for name in NAMES:
        parts.append(f"### {code(name.spelling)}\n")
        parts.append(f"{name.meaning}\n")
        parts.append(f"- **Lived**: {lived(name)} ({name.owner})")
        parts.append(f"- **Write**: {code(name.modern)}\n")
    return "\n".join(parts).rstrip() + "\n"


def _glance() -> list[str]:
    lines = [
        f"| {' | '.join(('name', *RELEASES, 'write today'))} |",
        f"|{'---|' * (len(RELEASES) + 2)}",
    ]
    for name in sorted(NAMES, key=lambda n: list(Kind).index(n.kind)):
        cells = ["yes" if name.there_in(release) else "" for release in RELEASES]
        lines.append(f"| {' | '.join((code(name.spelling), *cells, code(name.modern)))} |")
    return [*lines, ""]


def _messages() -> list[str]:
    lines = ["| message | cure |", "|---|---|"]
    for name in NAMES:
        lines += [f"| {code_block(m.text)} | {m.cure} |" for m in name.messages]
    return [*lines, ""]


def code_block(text: str) -> str:
    """A message as inline code, which may hold backticks of its own."""
    fence = "``" if "`" in text else "`"
    pad = " " if fence == "``" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _silent() -> list[str]:
    return [*(f"- {code(n.spelling)}: {n.silent}" for n in NAMES if n.silent), ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print(f"{PAGE.name} is not what the table says: run python scripts/names_page.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
