"""Short ways to migrate a snippet in a test."""

from mnemon.migrate import FileResult, Status, Target, migrate_source

TARGETS = ("4.57", "5.0", "5.23")
HEADER = "from transformers.cache_utils import Cache, DynamicCache, StaticCache\n"


def migrate(source: str, target: str = "5.23") -> FileResult:
    return migrate_source(source.encode(), Target(target))


def migrated(source: str, target: str = "5.23") -> str:
    """The new source; migrating it again must change nothing."""
    found = migrate(source, target)
    assert not found.problems
    again = migrate_source(found.after, Target(target))
    assert again.after == found.after
    return found.after.decode()


def body(line: str, target: str = "5.23", receiver: str = "cache: Cache") -> str:
    """What becomes of statements in a function that has a cache."""
    lines = "".join(f"    {part}\n" for part in line.splitlines())
    head = f"{HEADER}\n\ndef f({receiver}, k, v, i, n):\n"
    after = migrated(f"{head}{lines}", target)
    assert after.startswith(head), after
    return "\n".join(part[4:] for part in after[len(head) :].splitlines())


def undecided(source: str, target: str = "5.23") -> list[tuple[str, int]]:
    return [(f.rule, f.place.line) for f in migrate(source, target).of(Status.UNDECIDED)]
