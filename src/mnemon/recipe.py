"""The recipe language: how a cache is stored, in one line of text. Imports no torch.

    recipe  = [ term { "+" term } ]            ""  is the default: dense, every token, on the device
    term    = name [ "/" name ] [ "(" [ arg { "," arg } ] ")" ]
    arg     = [ key "=" ] value                value: integer (4096, 4k, 256MiB), decimal, word,
                                                      absolute path (/tmp, ~/tmp)

At most one format and one tier; order does not matter; nothing is ever evaluated as code.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from mnemon.bounds import LEAST_FRACTION, Bound
from mnemon.errors import RecipeError
from mnemon.schemes import CODES, PackedFormat

__all__ = ["LEARNED", "Recipe", "Role", "Term", "available", "parse"]

Value: TypeAlias = int | float | str
MAX_LENGTH = 1000
_WORD = r"[A-Za-z_][A-Za-z0-9_]*"
_TERM = re.compile(rf"({_WORD}(?:/{_WORD})?)\s*(?:\(([^()]*)\))?", re.ASCII)
_ARGUMENT = re.compile(rf"(?:({_WORD})\s*=\s*)?([A-Za-z0-9_.\-/~]+)", re.ASCII)
_INTEGER = re.compile(r"(\d{1,18})([kKmMgGtT]?)(?:i?B)?", re.ASCII)
_PATH = re.compile(r"~?/[A-Za-z0-9_.\-/]*", re.ASCII)
_DECIMAL = re.compile(r"\d{0,18}\.\d{1,18}|\d{1,18}\.", re.ASCII)
_SCALE = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


class Role(Enum):
    """What a term decides: how numbers are stored, which tokens stay, where bytes live."""

    FORMAT = "format"
    POLICY = "policy"
    TIER = "tier"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """One row of the table of terms. `ready` is False for what the language knows but not we."""

    role: Role
    ready: bool = False
    usage: str = ""


#: Policies that a retrofitted model brings with it: its config says how they work.
LEARNED = ("dmc", "dms")

# The one place that says which terms exist and which of them work today.
_TERMS: dict[str, _Known] = {
    "dense": _Known(role=Role.FORMAT, ready=True, usage="dense"),
    "static": _Known(role=Role.FORMAT, ready=True, usage="static(4096)"),
    **{name: _Known(role=Role.FORMAT, ready=True, usage=name) for name in CODES},
    "window": _Known(role=Role.POLICY, ready=True, usage="window(4096)"),
    "sinks": _Known(role=Role.POLICY, ready=True, usage="sinks(4) + window(4096)"),
    "random": _Known(role=Role.POLICY, ready=True, usage="random(keep=0.25)"),
    "h2o": _Known(role=Role.POLICY, ready=True, usage="h2o(keep=1024)"),
    "tova": _Known(role=Role.POLICY, ready=True, usage="tova(keep=1024)"),
    **{name: _Known(role=Role.POLICY) for name in ("snapkv", "key_norm")},
    **{name: _Known(role=Role.POLICY, ready=True, usage=name) for name in LEARNED},
    "host": _Known(role=Role.TIER, ready=True, usage="host"),
    "disk": _Known(role=Role.TIER, ready=True, usage="disk(memory=256MiB)"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One term of a recipe, e.g. ``static(4096)`` or ``sinks(n=4)``.

    Args:
        name: canonical name; ``"int4/int2"`` for a pair of formats (keys/values).
        args: positional arguments.
        options: keyword arguments, sorted by key.
    """

    name: str
    args: tuple[Value, ...] = ()
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        words = [str(value) for value in self.args]
        words += [f"{key}={value}" for key, value in self.options]
        return f"{self.name}({', '.join(words)})" if words else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A parsed recipe. ``str(recipe)`` is canonical: it parses to an equal recipe."""

    format: Term = Term(name="dense")
    policies: tuple[Term, ...] = ()
    tier: Term | None = None

    def __str__(self) -> str:
        terms = [*self.policies, self.format, *([self.tier] if self.tier else [])]
        return " + ".join(str(term) for term in terms)

    @property
    def static_tokens(self) -> int | None:
        """Tokens that ``static(n)`` makes room for; None for a cache that grows."""
        return int(self.format.args[0]) if self.format.name == "static" else None

    @property
    def packed(self) -> PackedFormat | None:
        """How keys and values are quantized; None for the model's dtype."""
        return None if self.format.name in ("dense", "static") else _packed(self.format)

    @property
    def bound(self) -> Bound | None:
        """How many tokens a layer holds under the recipe's policies; None for every token."""
        return _bound(self.policies)


def available() -> tuple[str, ...]:
    """Usage examples of the terms that work in this version."""
    return tuple(known.usage for known in _TERMS.values() if known.ready)


def parse(text: "str | Recipe | None") -> Recipe:
    """Parse a recipe.

    Args:
        text: e.g. ``""``, ``"static(4096)"``; a `Recipe` is returned as it is.

    Raises:
        RecipeError: not a string, bad syntax, an unknown term, a term that is not there yet, two
            formats or two tiers, wrong arguments. The message lists the valid terms.
    """
    if isinstance(text, Recipe):
        return text
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise RecipeError(
            f"A recipe is a string such as 'static(4096)' or ''; got {type(text).__name__}."
        )
    if len(text) > MAX_LENGTH:
        raise RecipeError(
            f"A recipe has at most {MAX_LENGTH} characters; got {len(text)}. {_valid()}"
        )
    formats: list[Term] = []
    policies: list[Term] = []
    tiers: list[Term] = []
    homes = {Role.FORMAT: formats, Role.POLICY: policies, Role.TIER: tiers}
    for term, role in _terms(text):
        homes[role].append(term)
    for what, terms in (("format", formats), ("tier", tiers)):
        if len(terms) > 1:
            names = ", ".join(str(term) for term in terms)
            raise RecipeError(f"Recipe {text!r} names {len(terms)} {what}s ({names}); keep one.")
    seen = [term.name for term in policies]
    if len(set(seen)) < len(seen):
        raise RecipeError(f"Recipe {text!r} names a policy twice; keep one of each.")
    _check_ready([*formats, *policies, *tiers], text)
    recipe = Recipe(
        format=formats[0] if formats else Term(name="dense"),
        policies=tuple(sorted(policies, key=str)),
        tier=tiers[0] if tiers else None,
    )
    _check_format(recipe.format)
    if recipe.tier is not None:
        _check_tier(recipe.tier)
    _check_policies(recipe)
    return recipe


def _terms(text: str) -> Iterator[tuple[Term, Role]]:
    """Terms of `text` with their roles, syntax and names checked."""
    if not text.strip():
        return
    for piece in text.split("+"):
        match = _TERM.fullmatch(piece.strip())
        if match is None:
            raise RecipeError(
                f"Cannot read {piece.strip()!r} in recipe {text!r}: a term is name, name(4096) or "
                f"name(key=value). {_valid()}"
            )
        name, arguments = match[1].lower(), match[2]
        parts = name.split("/")
        for part in parts:
            if part not in _TERMS:
                raise RecipeError(f"Unknown term {part!r} in recipe {text!r}. {_valid()}")
        role = _TERMS[parts[0]].role
        if len(parts) == 2 and any(_TERMS[part].role is not Role.FORMAT for part in parts):
            raise RecipeError(
                f"{name!r} in recipe {text!r} pairs what is not a format: keys/values formats are "
                f"written like int4/int2."
            )
        if len(parts) == 2 and "static" in parts:
            raise RecipeError(f"static(n) is for keys and values alike; got {name!r} in {text!r}.")
        yield _with_arguments(name, arguments or "", text), role


def _with_arguments(name: str, arguments: str, text: str) -> Term:
    """A `Term` with its arguments read as numbers or words."""
    positional: list[Value] = []
    options: dict[str, Value] = {}
    for piece in arguments.split(",") if arguments.strip() else ():
        match = _ARGUMENT.fullmatch(piece.strip())
        if match is None:
            raise RecipeError(
                f"Cannot read argument {piece.strip()!r} of {name!r} in recipe {text!r}: expected "
                f"a number such as 4096 or 4k, a word, or key=value."
            )
        key, value = match[1], _value(match[2], text)
        if key is None:
            if options:
                raise RecipeError(
                    f"{name!r} in recipe {text!r}: plain values come before key=value."
                )
            positional.append(value)
        elif key in options:
            raise RecipeError(f"{name!r} in recipe {text!r} gives {key!r} twice.")
        else:
            options[key] = value
    return Term(name=name, args=tuple(positional), options=tuple(sorted(options.items())))


def _value(word: str, text: str) -> Value:
    if integer := _INTEGER.fullmatch(word):
        return int(integer[1]) * _SCALE[integer[2].lower()]
    if _DECIMAL.fullmatch(word):
        return float(word)
    if re.fullmatch(_WORD, word, re.ASCII) or _PATH.fullmatch(word):
        return word
    raise RecipeError(
        f"Cannot read value {word!r} in recipe {text!r}: expected a number or a word."
    )


def _check_ready(terms: list[Term], text: str) -> None:
    """The one place where what the language knows and we do not have yet is refused."""
    for term in terms:
        missing = [part for part in term.name.split("/") if not _TERMS[part].ready]
        if missing:
            raise RecipeError(
                f"{missing[0]!r} in recipe {text!r} is part of the recipe language but not there "
                f"yet. {_valid()}"
            )


def _check_format(term: Term) -> None:
    if term.name == "dense" and (term.args or term.options):
        raise RecipeError(f"dense takes no arguments; got {term}.")
    if term.name == "static" and (
        len(term.args) != 1
        or term.options
        or not isinstance(term.args[0], int)
        or not 1 <= term.args[0] <= 2**40
    ):
        raise RecipeError(
            f"static takes one positive number of tokens, e.g. static(4096); got {term}."
        )
    if term.name not in ("dense", "static"):
        _packed(term)


#: Options of packed formats, with what they may be; a tuple of two numbers is a range.
_PACKED_OPTIONS: dict[str, tuple[int, int] | tuple[str, ...]] = {
    "residual": (0, 2**20),
    "keys": ("token", "channel"),
    "values": ("token", "channel"),
    "rotate": ("yes", "no"),
    "group": (16, 2**16),
}


def _packed(term: Term) -> PackedFormat:
    """The packed format that `term` names, e.g. ``int4/int2(residual=128, keys=channel)``.

    Raises:
        RecipeError: an option that is unknown or out of range.
    """
    names = term.name.split("/")
    if "dense" in names:
        raise RecipeError(
            f"A pair of formats is of two packed ones ({', '.join(CODES)}); got {term}."
        )
    options = dict(term.options)
    for name, value in options.items():
        allowed = _PACKED_OPTIONS.get(name)
        if allowed is None or term.args:
            break
        low, high, *_ = allowed
        if isinstance(low, str):
            fits = value in allowed
        else:
            fits = isinstance(value, int) and low <= value <= int(high)
        if not fits:
            expected = (
                " or ".join(map(str, allowed)) if isinstance(low, str) else f"{low} to {high}"
            )
            raise RecipeError(f"{name} of {term.name} is {expected}; got {name}={value}.")
    else:
        if not term.args:
            rotate = options.get("rotate")
            keys, values = options.get("keys"), options.get("values")
            group, residual = options.get("group"), options.get("residual")
            return PackedFormat.named(*names).altered(
                residual=None if residual is None else int(residual),
                keys=None if keys is None else str(keys),
                values=None if values is None else str(values),
                rotated=None if rotate is None else rotate == "yes",
                group=None if group is None else int(group),
            )
    raise RecipeError(
        f"{term.name} takes residual=64, keys=token or channel, values=token or channel, "
        f"rotate=yes or no, group=64; got {term}."
    )


def _check_tier(term: Term) -> None:
    options = dict(term.options)
    taken = {"host": ("segment",), "disk": ("memory", "path", "segment", "size")}[term.name]
    if term.args or not set(options) <= set(taken):
        raise RecipeError(
            f"{term.name} takes {_TIER_OPTIONS[term.name]}; got {term}: give them by name."
        )
    least = {"memory": 1 << 20, "size": 1, "segment": 64}
    for name, value in options.items():
        if name != "path" and (not isinstance(value, int) or value < least[name]):
            raise RecipeError(
                f"{term.name}({name}=...) takes a whole number from {least[name]} on; got {term}."
            )
    if int(options.get("segment", 64)) % 64:
        raise RecipeError(f"{term.name}(segment=...) takes a multiple of 64 tokens; got {term}.")
    path = options.get("path", "/")
    if not isinstance(path, str) or not path.startswith(("/", "~/")):
        raise RecipeError(
            f"disk(path=...) takes an absolute path of letters, digits and _.-/ (for others set "
            f"TMPDIR); got {term}."
        )


_TIER_OPTIONS = {
    "host": "segment=1024 (tokens that move at once)",
    "disk": (
        "memory=256MiB (what the cache may use of it), path=/dir (where its file lies), size=64GiB "
        "(how large it may become) and segment=1024 (tokens that move at once)"
    ),
}


#: What each policy takes, and how it is written. A policy without `keep` takes one plain number.
_POLICY_OPTIONS: dict[str, tuple[str, ...]] = {
    "window": ("every",),
    "sinks": (),
    "random": ("every", "keep", "seed"),
    "h2o": ("every", "keep", "recent"),
    "tova": ("every", "keep"),
}
_POLICY_USAGE = {
    "window": "window(4096) or window(0.25)",
    "sinks": "sinks(4) + window(4096)",
    "random": "random(keep=1024, seed=0)",
    "h2o": "h2o(keep=1024, recent=0.5)",
    "tova": "tova(keep=1024)",
}
_SCORED = ("h2o", "tova")  # they weigh every key at every step
_MOST_TOKENS = 2**40
_SCORE_BYTES = 4


def _check_policies(recipe: Recipe) -> None:
    """Refuse policies that do not go together, or not with the rest of the recipe."""
    names = tuple(sorted(term.name for term in recipe.policies if term.name in _POLICY_OPTIONS))
    if not names:
        _check_learned(recipe)
        return
    if len(recipe.policies) > 1 and names != ("sinks", "window"):
        terms = " + ".join(str(term) for term in recipe.policies)
        raise RecipeError(
            f"{terms} cannot be combined: one policy decides what stays. Valid are "
            f"{', '.join(_POLICY_USAGE.values())}."
        )
    if names == ("sinks",):
        raise RecipeError(
            f"{recipe.policies[0]} alone would forget what was just said; give it a window: "
            f"{_POLICY_USAGE['sinks']}."
        )
    for term in recipe.policies:
        _check_policy(term)
    if recipe.format.name == "static":
        raise RecipeError(
            f"{recipe}: static(n) makes room for every token and a policy drops some. Use a format "
            f"that grows: dense, {', '.join(CODES)}."
        )
    if recipe.tier is not None and names[0] in _SCORED:
        raise RecipeError(
            f"{recipe}: {names[0]} weighs every key at every step, which would be read from the "
            f"tier once more. With {recipe.tier.name} use {_POLICY_USAGE['window']}, "
            f"{_POLICY_USAGE['sinks']} or {_POLICY_USAGE['random']}, or leave the tier out."
        )


def _check_learned(recipe: Recipe) -> None:
    """Refuse two learned policies, and options that the model's config decides."""
    for term in recipe.policies:
        if term.args or term.options:
            raise RecipeError(
                f"{term.name} takes no arguments: the config of a retrofitted model has them; got "
                f"{term}."
            )
    if len(recipe.policies) > 1:
        terms = " + ".join(str(term) for term in recipe.policies)
        raise RecipeError(f"{terms} cannot be combined: a model was retrofitted with one of them.")


def _check_policy(term: Term) -> None:
    name, options, taken = term.name, dict(term.options), _POLICY_OPTIONS[term.name]
    number = options.get("keep") if "keep" in taken else (term.args or (None,))[0]
    plain = 0 if "keep" in taken else 1
    fits = len(term.args) == plain and set(options) <= set(taken)
    if not fits or not _is_amount(number, fraction=name != "sinks"):
        amount = "a whole number of tokens" + (
            "" if name == "sinks" else f" or a decimal fraction of those seen ({LEAST_FRACTION}..1)"
        )
        others = [f"{option}=" for option in taken if option != "keep"]
        raise RecipeError(
            f"{name} takes {amount}{' and ' if others else ''}{', '.join(others)}, e.g. "
            f"{_POLICY_USAGE[name]}; got {term}."
        )
    every, seed, recent = (options.get(option) for option in ("every", "seed", "recent"))
    if every is not None and not _is_amount(every, fraction=False):
        raise RecipeError(f"every of {name} is the number of tokens between drops; got {term}.")
    if isinstance(every, int) and isinstance(number, int) and every > number:
        raise RecipeError(f"every of {name} is at most the {number} tokens it keeps; got {term}.")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise RecipeError(f"seed of {name} is a whole number below 2**63; got {term}.")
    if recent is not None and not (
        not isinstance(recent, str) and (recent == 0 or LEAST_FRACTION <= recent <= 1)
    ):
        raise RecipeError(
            f"recent of {name} is the share of the newest tokens in what is kept, 0 or "
            f"{LEAST_FRACTION} to 1; got {term}."
        )


def _is_amount(value: Value | None, *, fraction: bool) -> bool:
    if isinstance(value, int):
        return 1 <= value <= _MOST_TOKENS
    return isinstance(value, float) and fraction and LEAST_FRACTION <= value <= 1


def _bound(policies: tuple[Term, ...]) -> Bound | None:
    """The bound that checked policies set; None where they let the model decide."""
    found = {term.name: term for term in policies if term.name in _POLICY_OPTIONS}
    main = next((term for name, term in found.items() if name != "sinks"), None)
    if main is None:
        return None
    options = dict(main.options)
    keep = main.args[0] if main.name == "window" else options["keep"]
    every = options.get("every")
    assert not isinstance(keep, str)
    return Bound(
        keep=keep,
        sinks=int(found["sinks"].args[0]) if "sinks" in found else 0,
        every=None if every is None else int(every),
        score_bytes=_SCORE_BYTES if main.name in ("h2o", "random") else 0,
    )


def _valid() -> str:
    later = ", ".join(name for name, known in _TERMS.items() if not known.ready)
    return f"Valid terms: {', '.join(available())}; '' is the default (later: {later})."
