"""Slots of keys and values whose number differs between the heads of a layer.

    data  [batch, kv_heads, capacity, width]        lengths  [batch, kv_heads]
           |<- live: lengths[b, h] ->|<- reserve ->|scrap|

Slots are addressed one by one, so order is up to the layer. The last slot of the capacity is scrap:
what a row or head does not keep is written there, so that no write depends on a number that would
have to come back from a device first.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mnemon.attention.slots import serves_slots, store_token
from mnemon.errors import CacheError
from mnemon.layers.memory import allocate

__all__ = ["RaggedSlots"]


@final
class RaggedSlots:
    """Keys and values in slots, with a number of live ones for every row and head.

    Forks share memory until one of them writes.
    """

    __slots__ = ("_base", "_bound", "_sharers", "lengths", "parts")

    def __init__(self) -> None:
        #: What a slot consists of, [batch, kv_heads, capacity, width] each: keys, values, ...
        self.parts: list[Tensor] = []
        #: Live slots, int32 [batch, kv_heads].
        self.lengths = torch.zeros((0, 0), dtype=torch.int32)
        self._base = torch.zeros((0, 0), dtype=torch.int64)
        self._bound = 0  # no length is above it; a number that is known without asking a device
        self._sharers = [1]

    # -- sizes -----------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        return not self.parts

    @property
    def batch_size(self) -> int:
        return int(self.parts[0].shape[0]) if self.parts else -1

    @property
    def capacity(self) -> int:
        return int(self.parts[0].shape[2]) if self.parts else 0

    @property
    def bound(self) -> int:
        """No row and head has more live slots."""
        return self._bound

    def longest(self) -> int:
        """The most live slots of any row and head (asks the device)."""
        self._bound = int(self.lengths.max()) if self.lengths.numel() else 0
        return self._bound

    @property
    def nbytes(self) -> int:
        """Bytes of the live slots."""
        if not self.parts:
            return 0
        slots = int(self.lengths.sum())
        return slots * sum(part.shape[-1] * part.element_size() for part in self.parts)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes allocated (on a CPU the untouched part is not resident)."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    # -- writing ---------------------------------------------------------------------------------

    def prepare(self, like: Sequence[Tensor], num_new: int) -> None:
        """Make room for `num_new` more slots of every head, in memory that nobody shares.

        `like` are tensors [batch, kv_heads, n, width], one for each part, of the numbers to come.
        """
        if not self.parts:
            shape, device = like[0].shape[:2], like[0].device
            self.lengths = torch.zeros(shape, dtype=torch.int32, device=device)
            self._allocate(like, num_new + 1)
        elif self._sharers[0] > 1:
            self._sharers[0] -= 1
            self._sharers = [1]
            self._move(self.longest() + num_new + 1)
        elif self._bound + num_new >= self.capacity:
            # The bound counts what was dropped, too: ask before memory is taken.
            if self.longest() + num_new >= self.capacity:
                self._move(self._bound + num_new + 1)
        self._bound += num_new

    def write(self, slots: Tensor, *numbers: Tensor) -> None:
        """Write ``[batch, kv_heads, n, width]`` each to `slots` ``[batch, kv_heads, n]``.

        Slots at or above the capacity's last one are scrap.
        """
        index = (self._base[..., None] + slots.clamp(max=self.capacity - 1)).flatten()
        for part, new in zip(self.parts, numbers, strict=True):
            width = part.shape[-1]
            part.view(-1, width).index_copy_(0, index, new.reshape(-1, width))

    def write_token(
        self,
        counts: Tensor,
        keys: Tensor,
        values: Tensor,
        decisions: Tensor,
        marks: Tensor | None = None,
    ) -> bool:
        """Take one token of every row and head in at once (see `store_token`), if that is served.

        `lengths`, `counts` and `marks` follow in place.
        """
        if not serves_slots(keys, values, decisions):
            return False
        store_token(self.parts, self.lengths, counts, keys, values, decisions, marks)
        return True

    def read(self, slots: Tensor) -> list[Tensor]:
        """What lies in `slots` ``[batch, kv_heads, n]``, each ``[batch, kv_heads, n, width]``."""
        index = (self._base[..., None] + slots).flatten()
        return [
            part.view(-1, part.shape[-1]).index_select(0, index).view(*slots.shape, part.shape[-1])
            for part in self.parts
        ]

    def scrap(self) -> int:
        """The slot for what is not kept."""
        return self.capacity - 1

    def _allocate(self, like: Sequence[Tensor], num_slots: int) -> None:
        shapes = [[*part.shape[:2], 0, part.shape[-1]] for part in like]
        self.parts = []
        for shape, part in zip(shapes, like, strict=True):
            memory = allocate(shape, num_slots, part, None)
            if memory.mapping is None:
                memory.data.zero_()  # a hidden slot counts 0 times its number, which must be one
            self.parts.append(memory.data)
        batch, heads = self.parts[0].shape[:2]
        device = self.parts[0].device
        with torch.inference_mode(False):
            self._base = torch.arange(batch * heads, device=device).view(batch, heads)
            self._base *= self.capacity
        self._bound = max(self._bound, 0)

    def _move(self, num_slots: int) -> None:
        """Copy the live slots to new memory; nothing beyond them is touched."""
        old, lengths = self.parts, self.lengths.tolist()
        self._allocate(old, num_slots)
        for part, source in zip(self.parts, old, strict=True):
            for row, heads in enumerate(lengths):
                for head, length in enumerate(heads):
                    part[row, head, :length] = source[row, head, :length]
        with torch.inference_mode(False):
            self.lengths = self.lengths.clone()

    # -- rows ------------------------------------------------------------------------------------

    def fork(self) -> "RaggedSlots":
        other = RaggedSlots()
        other.parts, other._base, other._bound = self.parts, self._base, self._bound
        other.lengths = self.lengths.clone()
        other._sharers = self._sharers
        if self.parts:
            self._sharers[0] += 1
        return other

    def promote(self, side: int, dtype: torch.dtype) -> None:
        """Hold keys (0) or values (1) in a dtype that also holds `dtype`."""
        part = self.parts[side]
        promoted = torch.promote_types(part.dtype, dtype)
        if promoted is not part.dtype:
            with torch.inference_mode(False), torch.no_grad():
                self.parts = [x.clone() for x in self.parts]
                self.parts[side] = part.to(promoted)
            if self._sharers[0] > 1:
                self._sharers[0] -= 1
                self._sharers = [1]
                self.lengths = self.lengths.clone()

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was."""
        if self.parts:
            self._replace([self], [(0, int(row)) for row in index.tolist()])

    @staticmethod
    def stacked(sources: Sequence["RaggedSlots"]) -> "RaggedSlots":
        """The rows of all `sources`, which hold something.

        Raises:
            CacheError: other heads, widths, dtypes or devices.
        """
        first = sources[0].parts
        for other in sources[1:]:
            for one, part in zip(first, other.parts, strict=True):
                if (one.shape[1], one.shape[3], one.dtype, one.device) != (
                    part.shape[1], part.shape[3], part.dtype, part.device,
                ):  # fmt: skip
                    raise CacheError(
                        f"Cannot merge layers of {list(one.shape)} {one.dtype} and "
                        f"{list(part.shape)} {part.dtype}: they come from different models."
                    )
        result = RaggedSlots()
        result._replace(
            sources,
            [(i, row) for i, one in enumerate(sources) for row in range(one.batch_size)],
        )
        return result

    def _replace(self, sources: Sequence["RaggedSlots"], rows: Sequence[tuple[int, int]]) -> None:
        """Hold rows of `sources`, each given as (source, row)."""
        old = [(one.parts, one.lengths) for one in sources]
        if self._sharers[0] > 1:
            self._sharers[0] -= 1
        self._sharers = [1]
        with torch.inference_mode(False):
            picked = [old[source][1][row] for source, row in rows]
            self.lengths = torch.stack(picked) if picked else old[0][1][:0].clone()
            longest = self.longest()
            heads = old[0][1].shape[1]
            like = [part.new_empty((len(rows), heads, 0, part.shape[-1])) for part in old[0][0]]
        self._allocate(like, longest + 1)
        if len(sources) == 1 and len(rows) * heads > 64:
            index = torch.tensor([row for _, row in rows], device=self.lengths.device)
            for part, given in zip(self.parts, old[0][0], strict=True):
                part[:, :, :longest] = given[:, :, :longest].index_select(0, index)
            return
        for at, (source, row) in enumerate(rows):
            for head, length in enumerate(old[source][1][row].tolist()):
                for part, given in zip(self.parts, old[source][0], strict=True):
                    part[at, head, :length] = given[row, head, :length]

    def clear(self) -> None:
        if self._sharers[0] > 1:
            self._sharers[0] -= 1
        self.__init__()

    # -- whole content ---------------------------------------------------------------------------

    def live(self) -> Tensor:
        """Which slots are live, bool [batch, kv_heads, longest]."""
        slots = torch.arange(self.longest(), device=self.lengths.device)
        return slots < self.lengths[..., None]

    def packed(self) -> list[Tensor]:
        """The live slots of all rows and heads one after the other, ``[slots, width]`` each."""
        live = self.live()
        return [part[:, :, : live.shape[-1]][live] for part in self.parts]

    def unpack(self, lengths: Tensor, numbers: Sequence[Tensor]) -> None:
        """Hold what `packed` gave; the inverse.

        Raises:
            CacheError: numbers that do not fit the lengths.
        """
        slots = int(lengths.sum())
        if any(part.ndim != 2 or part.shape[0] != slots for part in numbers):
            raise CacheError(
                f"{slots} slots are said to be there and {[list(x.shape) for x in numbers]} came."
            )
        self.clear()
        with torch.inference_mode(False):
            self.lengths = lengths.to(torch.int32).clone()
            longest = self.longest()
            like = [part.new_empty((*lengths.shape, 0, part.shape[-1])) for part in numbers]
        self._allocate(like, longest + 1)
        live = self.live()
        for part, given in zip(self.parts, numbers, strict=True):
            part[:, :, :longest][live] = given
