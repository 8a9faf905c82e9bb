"""Which releases of transformers are served, and by which adapter. Nothing here imports it."""

from mnemon.errors import VersionError

__all__ = ["ADAPTERS", "REQUIREMENT", "adapter_for", "release"]

#: First and last release that an adapter serves, both included, and its module.
ADAPTERS: tuple[tuple[tuple[int, int], tuple[int, int], str], ...] = (
    ((4, 57), (4, 57), "v4_57"),
    ((5, 14), (5, 18), "v5_14"),
    ((5, 19), (5, 21), "v5_19"),
    ((5, 22), (5, 23), "v5_22"),
)

#: The same for pip; a test compares it with pyproject.toml.
REQUIREMENT = "transformers>=4.57,<5.24," + ",".join(f"!=5.{minor}.*" for minor in range(14))

_WORDS = "4.57, and 5.14 to 5.23"


def release(version: str) -> tuple[int, int]:
    """``"5.23.0.dev0"`` as ``(5, 23)``: what mnemon depends on changes between minor releases.

    Raises:
        VersionError: not a version number.
    """
    parts = version.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        raise VersionError(
            f"transformers calls itself version {version!r}, which is no version number; mnemon "
            f"works with {_WORDS}. Reinstall it: {_command()}"
        ) from None


def adapter_for(version: str) -> str:
    """The module that adapts to `version` of transformers.

    Raises:
        VersionError: a release that mnemon does not work with.
    """
    wanted = release(version)
    for first, last, module in ADAPTERS:
        if first <= wanted <= last:
            return module
    raise VersionError(
        f"transformers {version} is installed, and this mnemon works with {_WORDS}. Install one of "
        f"them: {_command()}" + (", or a newer mnemon" if wanted > ADAPTERS[-1][1] else "")
    )


def _command() -> str:
    return f'pip install "{REQUIREMENT}"'
