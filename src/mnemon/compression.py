"""How a retrofitted model compresses its cache: what its config says of it. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

from mnemon.errors import LearnedMemoryError

__all__ = ["CONFIG_NAME", "Compression", "Method", "Source", "compression_of"]

CONFIG_NAME = "mnemon_memory"
"""The entry of a model's config (``config.json``) that says how its cache is compressed."""

Method = Literal["dmc", "dms"]
Source = Literal["neuron", "projection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """How the layers of one model compress.

    Args:
        method: ``"dmc"`` merges tokens into the newest slot, ``"dms"`` marks tokens and drops them
            once they leave a window.
        window: DMS: tokens before a query that are always seen (0: a marked token is dropped at
            once). DMC: tokens of a segment that its slot averages, at most.
        source: what decides: a borrowed ``"neuron"`` (DMC: the last of every key head; DMS: the
            last of the first query head of every group) or a ``"projection"`` of the layer's
            input (DMS only).
        offset: added to every decision's logit.
        factor: what the neuron or projection is multiplied with.
        ratio: the compression that the model was trained for.
    """

    method: Method
    window: int
    source: Source
    offset: float = -5.0
    factor: float = 1.0
    ratio: float = 1.0

    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        "dmc": {"window": 12, "source": "neuron", "factor": 1.0},
        "dms": {"window": 256, "source": "projection", "factor": 100.0},
    }

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise LearnedMemoryError(
                f"A cache is compressed by one of {', '.join(get_args(Method))}; got "
                f"{self.method!r}."
            )
        sources = ("neuron",) if self.method == "dmc" else get_args(Source)
        if self.source not in sources:
            raise LearnedMemoryError(
                f"{self.method} takes its decisions from {' or '.join(sources)}; got "
                f"{self.source!r}."
            )
        least = 1 if self.method == "dmc" else 0
        if (
            isinstance(self.window, bool)
            or not isinstance(self.window, int)
            or (not least <= self.window <= 1 << 20)
        ):
            raise LearnedMemoryError(
                f"The window of {self.method} is a whole number from {least} on; got "
                f"{self.window!r}."
            )
        for name in ("offset", "factor", "ratio"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or (not abs(value) < 1e6)
            ):
                raise LearnedMemoryError(f"{name} is a finite number; got {value!r}.")
        if self.ratio < 1:
            raise LearnedMemoryError(
                f"ratio is the compression trained for, 1 or more; got {self.ratio}."
            )

    @classmethod
    def named(cls, method: str, **options: Any) -> Self:
        """The defaults of `method` with `options` in their place; None keeps a default.

        Raises:
            LearnedMemoryError: an unknown method or option, or a value out of range.
        """
        defaults = cls.DEFAULTS.get(method, {"window": 1, "source": "neuron"})
        given = {name: value for name, value in options.items() if value is not None}
        return cls.of(defaults | given | {"method": method})

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Self:
        """What a config's entry says.

        Raises:
            LearnedMemoryError: an entry that is missing, unknown or out of range.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(entries, Mapping) or not {"method", "window", "source"} <= set(entries):
            raise LearnedMemoryError(
                f"{CONFIG_NAME} of a config names method, window and source; got {entries!r}."
            )
        unknown = sorted(set(entries) - names)
        if unknown:
            raise LearnedMemoryError(
                f"{', '.join(unknown)}: unknown to this version of mnemon, which knows "
                f"{', '.join(sorted(names))}."
            )
        return cls(**entries)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the inverse of `of`."""
        return asdict(self)


def compression_of(config: Any) -> Compression | None:
    """What `config` says about compression; None for a model that was not retrofitted.

    Raises:
        LearnedMemoryError: an entry that contradicts itself.
    """
    entries = getattr(config, CONFIG_NAME, None)
    return None if entries is None else Compression.of(entries)
