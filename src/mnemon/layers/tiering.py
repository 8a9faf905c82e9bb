"""From the tier of a recipe to tiered layers that share it."""

from typing import final

from mnemon.layers.frozen_slots import Codec
from mnemon.layers.hot import DenseHot, PackedHot
from mnemon.layers.order import LayerOrder
from mnemon.layers.tiered import TieredLayer
from mnemon.layers.tiered_slots import TieredSlots
from mnemon.recipe import Recipe, Term
from mnemon.schemes import PackedFormat
from mnemon.tiers import DiskTier, HostTier, Tier
from mnemon.tiers.disk import DEFAULT_MEMORY_BYTES

__all__ = ["Tiering"]


@final
class Tiering:
    """What the tiered layers of one cache have in common.

    Args:
        term: the recipe's tier.
        form: the recipe's packed format; None for the model's dtype.
        max_tokens: of ``static(n)``.
    """

    def __init__(
        self, term: Term, form: PackedFormat | None = None, max_tokens: int | None = None
    ) -> None:
        self.tier = _tier(term)
        self.order = LayerOrder[TieredLayer]()
        self.slots_order = LayerOrder[TieredSlots]()
        self.form = form
        self.max_tokens = max_tokens
        segment = dict(term.options).get("segment")
        self.segment_tokens = None if segment is None else int(segment)

    @classmethod
    def of(cls, recipe: Recipe) -> "Tiering | None":
        """For a recipe; None if it names no tier."""
        return (
            None if recipe.tier is None else cls(recipe.tier, recipe.packed, recipe.static_tokens)
        )

    def layer(self) -> TieredLayer:
        """The next layer."""
        hot = DenseHot() if self.form is None else PackedHot(self.form)
        return TieredLayer(
            self.tier,
            hot,
            self.order,
            max_tokens=self.max_tokens,
            segment_tokens=self.segment_tokens,
        )

    def slots(self) -> TieredSlots:
        """The same for the slots of a model that compresses its cache."""
        return TieredSlots(self.tier, self.slots_order, Codec(self.form), self.segment_tokens)


def _tier(term: Term) -> Tier:
    if term.name == "host":
        return HostTier()
    options = dict(term.options)
    path, size = options.get("path"), options.get("size")
    return DiskTier(
        memory_bytes=int(options.get("memory", DEFAULT_MEMORY_BYTES)),
        directory=None if path is None else str(path),
        limit_bytes=None if size is None else int(size),
    )
