"""What one `mnemon demo` measured: plain data, printed as a table, JSON and report.html."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

__all__ = ["DemoResult", "FedTwice", "Reuse", "Row", "SpeedPoint"]


@dataclass(slots=True, kw_only=True)
class Row:
    """One cache in the comparison; a figure that could not be measured is None.

    Attributes:
        name: as shown.
        library: "transformers" or "mnemon".
        tokens_per_s: new tokens per second after the first, median of the runs.
        first_token_s: seconds to the first token, median of the runs.
        bytes_per_token: stored bytes per token held.
        held_bytes: all buffers, reserve included.
        peak_bytes: how far memory rose during one whole generation.
        agreement: share of greedy tokens equal to the reference's, position by position.
        logit_difference: mean absolute difference of the logits, on the same text.
        bits_per_byte: of the text after the prompt, fed through the cache.
        tokens: the greedy tokens.
        text: the same as text.
        recall: distance in tokens -> share of planted values recalled.
        error: why this cache could not run this model, else "".
    """

    name: str
    library: str
    tokens_per_s: float | None = None
    first_token_s: float | None = None
    bytes_per_token: float | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    agreement: float | None = None
    logit_difference: float | None = None
    bits_per_byte: float | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    recall: dict[int, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPoint:
    """Speed of one cache with one context."""

    name: str
    context: int
    tokens_per_s: float
    first_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """Time to the first token of a long prompt, three ways.

    Attributes:
        num_prompt: tokens of the prompt.
        num_shared: leading tokens that the kept and the saved cache hold.
        num_reused: tokens that mnemon verified and did not compute again.
        fresh_s: an empty cache, per run.
        kept_s: a cache kept in memory, per run.
        loaded_s: a cache loaded from a file, the loading included, per run.
        file_bytes: size of the file.
        save_s: seconds to write it.
        same_tokens: whether the three ways went on with the same tokens.
    """

    num_prompt: int
    num_shared: int
    num_reused: int
    fresh_s: list[float]
    kept_s: list[float]
    loaded_s: list[float]
    file_bytes: int
    save_s: float
    same_tokens: bool

    def medians(self) -> tuple[float, float, float]:
        """Seconds to the first token: fresh, kept in memory, loaded from the file."""
        return median(self.fresh_s), median(self.kept_s), median(self.loaded_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedTwice:
    """Prompts that a cache already holds, given to `generate` again.

    Attributes:
        name: whose cache.
        num_prompt: tokens of each prompt.
        num_prompts: prompts tried.
        num_same: prompts that went on as from an empty cache.
        num_held: tokens in the cache after the new ones; None where it keeps no count.
        num_right: tokens that it should hold.
        text: how the first wrong answer went on; the first of all where none is wrong.
        right_text: how that one goes on from an empty cache.
        error: what was raised, else "".
    """

    name: str
    num_prompt: int
    num_prompts: int
    num_same: int
    num_held: int | None
    num_right: int
    text: str
    right_text: str
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether every answer was right and the cache holds what it should."""
        return self.num_same == self.num_prompts and self.num_held in (None, self.num_right)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Everything one run of the demo measured."""

    model: dict[str, Any]
    source: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    speed: list[SpeedPoint]
    reuse: Reuse | None
    fed_twice: list[FedTwice]
    prompt_end: str
    notes: list[str]
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)
