"""What is asked of each step of a retrofit: how much compression, at what learning rate.

    step        0 ........ N1 .................. N1 + N2 ................ N
    neuron      1 -> 0     0                     0                          a borrowed neuron only
    ratio       1          1 -> CR               CR
    rate        1          1                     1 -> 1/10, a cosine

Source:
    DMC (2403.09636), section 4: its three stages. DMS (2506.05345) has the last two.
"""

import math
from typing import NamedTuple

from mnemon.memory.retrofitting.options import RetrofitOptions

__all__ = ["Setting", "Stages", "stages_of"]

_LEAST_RATE = 0.1
_WARMUP = 10  # steps in which Adam's averages form


class Setting(NamedTuple):
    """What one step trains with.

    Attributes:
        neuron_left: how much of a borrowed neuron still counts in scores.
        compresses: decisions are taken; before, every token is kept.
        ratio: asked for, tokens per slot.
        target: the share of tokens to compress away, ``1 - 1 / ratio``.
        rate: factor on the learning rates.
    """

    neuron_left: float
    compresses: bool
    ratio: float
    target: float
    rate: float


class Stages(NamedTuple):
    """How many steps each stage takes, and what the last one holds."""

    neuron: int
    ramp: int
    hold: int
    ratio: float

    def at(self, step: int) -> Setting:
        """What step `step`, counted from 0, trains with."""
        left = max(0.0, 1.0 - step / self.neuron) if self.neuron else 0.0
        done = step - self.neuron
        grown = min(1.0, max(0, done) / self.ramp) if self.ramp else float(done >= 0)
        ratio = 1.0 + (self.ratio - 1.0) * grown
        held = (done - self.ramp) / self.hold if self.hold else 0.0
        fallen = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, held)))
        rate = _LEAST_RATE + (1.0 - _LEAST_RATE) * fallen
        rate *= min(1.0, (step + 1) / _WARMUP)
        return Setting(left, done >= 0 and self.ratio > 1.0, ratio, 1.0 - 1.0 / ratio, rate)


def stages_of(options: RetrofitOptions) -> Stages:
    """The stages of a run; only what borrows a neuron has the first."""
    compression = options.compression()
    borrows = compression is not None and compression.source == "neuron"
    neuron = round(options.steps * options.neuron_share) if borrows else 0
    ramp = round(options.steps * options.ramp_share)
    ratio = float(options.ratio) if compression is not None else 1.0
    return Stages(neuron, ramp, options.steps - neuron - ramp, ratio)
