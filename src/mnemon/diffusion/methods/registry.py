"""The methods by name, and the text form ``name(option=value, ...)``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mnemon.diffusion.methods.base import Method
from mnemon.diffusion.methods.dbcache import DBCache
from mnemon.diffusion.methods.first_block import FirstBlock
from mnemon.diffusion.methods.fitted import Fitted
from mnemon.diffusion.methods.interval import Interval
from mnemon.diffusion.methods.l2c import L2C
from mnemon.diffusion.methods.taylor import Taylor
from mnemon.diffusion.methods.toca import DuCa, ToCa
from mnemon.errors import DiffusionError

__all__ = ["METHODS", "make_method"]

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (Interval, Taylor, FirstBlock, DBCache, ToCa, DuCa, L2C, Fitted)
}
_CALL = re.compile(r"\s*([a-z_0-9]+)\s*(?:\(([^()]*)\))?\s*")


def make_method(method: str | Method, **options: Any) -> Method:
    """A method from its name or text and options; nothing is evaluated as code.

    Raises:
        DiffusionError: no such method, no such option, or a bad value.
    """
    if isinstance(method, Method):
        if options:
            raise DiffusionError(
                f"a {type(method).__name__} came together with {', '.join(options)}; give options "
                "to the method itself"
            )
        return method
    match = _CALL.fullmatch(method) if isinstance(method, str) else None
    if match is None or match[1] not in METHODS:
        raise DiffusionError(
            f"method {method!r} came; expected one of {', '.join(METHODS)}, perhaps with options "
            "in brackets, as in 'taylor(order=1, interval=3)'"
        )
    kind = METHODS[match[1]]
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for place, word in enumerate(w for w in (match[2] or "").split(",") if w.strip()):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            if place >= len(names):
                raise DiffusionError(f"{kind.name} has {len(names)} options, not {place + 1}")
            key, value = names[place], key
        given[key] = _value(value)
    given |= options
    unknown = [name for name in given if name not in names]
    if unknown:
        raise DiffusionError(
            f"{kind.name} has no option {unknown[0]!r}; it has {', '.join(names) or 'none'}"
        )
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    missing = [name for name in needed if name not in given]
    if missing:
        raise DiffusionError(
            f"{kind.name} needs {missing[0]}, as in '{kind.name}({missing[0]}=FILE)'"
        )
    return kind(**given)


def _value(text: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"none": None, "true": True, "false": False}.get(text.lower(), text)
