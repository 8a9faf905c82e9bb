"""What a retrofit is asked to do."""

from dataclasses import dataclass

from mnemon.compression import Compression
from mnemon.errors import LearnedMemoryError

__all__ = ["RetrofitOptions"]

_LOSSES = ("distill", "text", "both")
_METHODS = ("dmc", "dms", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrofitOptions:
    """How a model is retrofitted.

    Args:
        method: ``"dmc"``, ``"dms"``, or ``"none"``: the same training without compression, a
            control.
        ratio: tokens seen per slot kept, at the end.
        steps: of the optimiser.
        length: tokens of a row.
        batch: rows of that length in a step.
        window: see `Compression`; None is the method's default. 0 drops a marked token of DMS at
            once.
        source: what decides, see `Compression`; None is the method's default.
        factor: see `Compression`; None is the method's default.
        loss: ``"distill"`` follows the model as it came, ``"text"`` the next token, ``"both"``
            their sum.
        pressure: weight of what the compression lacks of its target.
        rate: learning rate of the model's weights.
        decision_rate: learning rate of the projections that decide.
        neuron_share: of the steps, in which a borrowed neuron fades from the scores.
        ramp_share: of the steps, in which the target grows from 1 to `ratio`; the others hold it.
        weight_decay: of matrices; embeddings, norms, biases and decisions have none.
        seed: of rows and noise.
    """

    method: str = "dmc"
    ratio: float = 4.0
    steps: int = 500
    length: int = 1024
    batch: int = 4
    window: int | None = None
    source: str | None = None
    factor: float | None = None
    loss: str = "distill"
    pressure: float = 2.0
    rate: float = 3e-5
    decision_rate: float = 1e-4
    neuron_share: float = 0.15
    ramp_share: float = 0.5
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise LearnedMemoryError(
                f"A model is retrofitted with one of {', '.join(_METHODS)}; got {self.method!r}."
            )
        if self.loss not in _LOSSES:
            raise LearnedMemoryError(f"The loss is one of {', '.join(_LOSSES)}; got {self.loss!r}.")
        for name, least in (("steps", 1), ("length", 16), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LearnedMemoryError(
                    f"{name} of a retrofit is a whole number from {least} on; got {value!r}."
                )
        for name, low, high in (
            ("ratio", 1, 1000),
            ("pressure", 0, 1e6),
            ("rate", 0, 1),
            ("decision_rate", 0, 1),
            ("weight_decay", 0, 10),
            ("neuron_share", 0, 0.9),
            ("ramp_share", 0, 1),
        ):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or (not low <= value <= high)
            ):
                raise LearnedMemoryError(
                    f"{name} of a retrofit is from {low} to {high}; got {value!r}."
                )
        if self.neuron_share + self.ramp_share > 1:
            raise LearnedMemoryError(
                f"neuron_share and ramp_share are parts of one run: at most 1 together; got "
                f"{self.neuron_share} and {self.ramp_share}."
            )
        self.compression()  # window, source and factor fit the method

    def compression(self) -> Compression | None:
        """What the model will do; None for the control."""
        if self.method == "none":
            return None
        return Compression.named(
            self.method,
            window=self.window,
            source=self.source,
            factor=self.factor,
            ratio=float(self.ratio),
        )
