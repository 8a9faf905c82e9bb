"""One tree of errors."""

import inspect

import pytest

from mnemon import errors

BUILTIN = {
    "RecipeError": ValueError,
    "CacheError": RuntimeError,
    "FileError": OSError,
    "ModelError": ValueError,
    "PlanError": ValueError,
    "DiffusionError": ValueError,
    "NoSites": ValueError,
    "ExportError": ValueError,
    "LearnedMemoryError": ValueError,
    "MigrateError": ValueError,
    "ZooError": RuntimeError,
    "DependencyError": ImportError,
}
PARENTS = {
    "UnsupportedVerb": "CacheError",
    "CapacityError": "CacheError",
    "PrefixMismatch": "CacheError",
    "TierError": "CacheError",
    "DiskFull": "TierError",
    **dict.fromkeys(
        ["NotACacheFile", "UnsafeFile", "TruncatedFile", "DamagedFile", "NewerVersion"], "FileError"
    ),
    "WrongModel": "FileError",
    "NotServed": "ModelError",
    "VersionError": "DependencyError",
}


def test_the_tree_is_complete() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__) == {"MnemonError", *BUILTIN, *PARENTS}
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.MnemonError)
        assert getattr(errors, name).__doc__
        assert name in errors.__doc__  # it is drawn


@pytest.mark.parametrize("name", BUILTIN)
def test_each_branch_is_also_what_python_calls_it(name: str) -> None:
    assert issubclass(getattr(errors, name), BUILTIN[name])


@pytest.mark.parametrize("name", PARENTS)
def test_leaves_are_caught_by_their_branch(name: str) -> None:
    with pytest.raises(getattr(errors, PARENTS[name]), match="why"):
        raise getattr(errors, name)("why")
