"""A tier: puts bytes away under a key, and streams them back in the order asked for."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeAlias, final

import torch
from torch import Tensor

from mnemon.errors import TierError

__all__ = ["Fill", "Record", "Settle", "Tier", "Tile", "nothing_runs"]

#: Writes rows of bytes into a uint8 ``[count, stride]``.
Fill: TypeAlias = Callable[[Tensor], None]
#: Waits until nobody uses what a stream brought.
Settle: TypeAlias = Callable[[], None]

_serials = itertools.count()


@final
class Record:
    """The key to bytes that a tier keeps, for as long as somebody holds it.

    Args:
        num_bytes: bytes that were asked for.
        stride: bytes that they take, padding included.
        place: where they are; only the tier knows what it means.
        let_go: called with the place when nobody holds the record any more, from any thread.
    """

    __slots__ = ("__weakref__", "let_go", "num_bytes", "place", "serial", "stride")

    def __init__(
        self, num_bytes: int, stride: int, place: Any, let_go: Callable[[Any], None]
    ) -> None:
        self.num_bytes = num_bytes
        self.stride = stride
        self.place = place
        self.let_go = let_go
        self.serial = next(_serials)

    def __del__(self) -> None:
        self.let_go(self.place)


#: What is read at once: records of one size, each once.
Tile: TypeAlias = tuple[Record, ...]


def nothing_runs() -> None:
    """What is used is used by whoever asks for the next one."""


class Tier(ABC):
    """Opaque bytes, put away and streamed back. Used by one thread; reading ahead is its own.

    A tier belongs to one cache and to the caches made from it (forks, extracted rows): their
    layers share its memory and its file.
    """

    #: The word of the recipe.
    name: ClassVar[str]
    #: Where the model computes; known from `bind` on.
    device: torch.device | None = None
    #: Records begin at multiples of so many bytes.
    alignment: ClassVar[int] = 64

    def bind(self, device: torch.device) -> None:
        """Stream to `device` from now on.

        Raises:
            TierError: it streams to another one.
        """
        if self.device is None:
            self.device = device
            self._bound(device)
        elif self.device != device:
            raise TierError(
                f"The {self.name} tier of this cache streams to {self.device} and keys on {device} "
                f"came: a tier serves one device. Leave the tier out for models that are spread."
            )

    def _bound(self, device: torch.device) -> None:  # noqa: B027  (nothing to prepare)
        """The device is known."""

    def stride(self, num_bytes: int) -> int:
        """Bytes that a record of `num_bytes` takes."""
        return -(-num_bytes // self.alignment) * self.alignment

    def reserve(self, count: int, num_bytes: int) -> None:  # noqa: B027  (memory just grows)
        """Make sure that `count` records of `num_bytes` fit before any of them is written.

        Raises:
            DiskFull: they do not; nothing changed.
        """

    def preallocate(self, num_bytes: int) -> None:  # noqa: B027  (memory just grows)
        """Set `num_bytes` aside for good, where that is possible.

        Raises:
            DiskFull: they are not there; nothing changed.
        """

    @abstractmethod
    def put(self, count: int, num_bytes: int, fill: Fill) -> tuple[Record, ...]:
        """Keep `count` rows of `num_bytes` bytes.

        Args:
            count: rows.
            num_bytes: of each row.
            fill: writes them into a uint8 ``[count, stride]``, on whatever device.

        Raises:
            TierError: they cannot be kept; nothing changed. `DiskFull` where that is why.
        """

    @abstractmethod
    def stream(
        self,
        tiles: Sequence[Tile],
        then: Callable[[], Iterable[Tile]],
        held: int = 1,
        settle: Settle = nothing_runs,
    ) -> Iterator[Tensor]:
        """The bytes of each tile in turn, uint8 ``[records, stride]`` on the model's device.

        What comes out is valid until the next one is asked for (with `held`, the one so many
        places on). While it is used, the tiles that follow are being read.

        Args:
            tiles: what to read, in order.
            then: what will probably be read after that: the next layer's tiles.
            held: tiles that are in use at once, at most `most_held`.
            settle: called when the stream ends, before those are given back.

        Raises:
            TierError: bytes that cannot be read.
        """

    def most_held(self, num_bytes: int) -> int:
        """Tiles of `num_bytes` that may be in use at once while another one is being read."""
        return 1

    def claim(self, owner: object, num_bytes: int) -> None:  # noqa: B027  (see DiskTier)
        """Say how much memory beside the tier `owner` needs, where memory is bounded."""

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of memory that the cache may use; None without a bound."""
        return None

    @abstractmethod
    def where(self, record: Record) -> str:
        """``"device"``, ``"host"`` or ``"disk"``."""

    @property
    @abstractmethod
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that hold what is being read."""
