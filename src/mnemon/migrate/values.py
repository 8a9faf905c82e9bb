"""What an expression may be, as far as its file tells: a set of possibilities.

A receiver is rewritten only when every possibility is a cache of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import final

__all__ = [
    "ANY_CACHE",
    "CONVENTION",
    "CONVENTIONAL",
    "LEGACY",
    "NONE",
    "NOTHING",
    "OTHER",
    "STALE",
    "UNKNOWN",
    "Atom",
    "Sort",
    "Value",
    "cache",
    "has_sort",
    "is_cache",
    "is_named_cache",
    "may_be_cache",
    "without",
]


class Sort(StrEnum):
    """What one possibility is."""

    CACHE = "cache"  # an instance; the name says of which class
    LAYER = "layer"  # an element of cache.layers
    CLASS = "class"  # a class of transformers, or of this file
    MODULE = "module"  # transformers, or a module of it
    FUNCTION = "function"  # a function of this file
    BOUND = "bound"  # a method of this file with its object
    INSTANCE = "instance"  # of a class of this file that is no cache
    OUTPUT = "output"  # what a model or generate returned
    CONVENTION = "convention"  # called past_key_values: a cache or, in old code, a tuple
    LEGACY = "legacy"  # a tuple of (keys, values)
    GUARD = "guard"  # a condition kept in a variable
    VERSION = "version"  # the installed release of transformers
    NONE = "none"
    OTHER = "other"  # certainly no cache
    UNKNOWN = "unknown"


@final
@dataclass(frozen=True, slots=True)
class Atom:
    """One possibility.

    Args:
        sort: what it is.
        name: of which class, module or function.
        node: what it came from, where that matters.
    """

    sort: Sort
    name: str = ""
    node: object = None


Value = frozenset[Atom]

NOTHING: Value = frozenset()
UNKNOWN: Value = frozenset({Atom(Sort.UNKNOWN)})
OTHER: Value = frozenset({Atom(Sort.OTHER)})
NONE: Value = frozenset({Atom(Sort.NONE)})
STALE: Value = frozenset({Atom(Sort.OTHER, "stale")})  # a condition on what has changed since
LEGACY: Value = frozenset({Atom(Sort.LEGACY)})
CONVENTION: Value = frozenset({Atom(Sort.CONVENTION)})

# What everyone calls the cache between models and generate. In old code it may also be a tuple.
CONVENTIONAL = frozenset({"past_key_values", "past_key_value", "next_decoder_cache", "next_cache"})


def cache(name: str = "Cache") -> Value:
    """An instance of the cache class `name`."""
    return frozenset({Atom(Sort.CACHE, name)})


ANY_CACHE = cache()


def without(value: Value, *sorts: Sort) -> Value:
    """`value` with the possibilities of these sorts ruled out."""
    return frozenset(atom for atom in value if atom.sort not in sorts)


def has_sort(value: Value, *sorts: Sort) -> bool:
    """Whether a possibility is of one of these sorts."""
    return any(atom.sort in sorts for atom in value)


def is_cache(value: Value) -> bool:
    """Whether it is a cache, or None, and nothing else."""
    rest = without(value, Sort.NONE)
    return bool(rest) and all(atom.sort is Sort.CACHE for atom in rest)


def is_named_cache(value: Value) -> bool:
    """Whether it is a cache, or what everyone calls one; a tuple has none of a cache's names."""
    rest = without(value, Sort.NONE, Sort.LEGACY)
    return bool(rest) and all(atom.sort in (Sort.CACHE, Sort.CONVENTION) for atom in rest)


def may_be_cache(value: Value) -> bool:
    """Whether a cache is among the possibilities."""
    return has_sort(value, Sort.CACHE, Sort.CONVENTION)
