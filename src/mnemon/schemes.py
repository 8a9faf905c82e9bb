"""What packed formats are: codes, groups, rotation, and how many bytes they take. No torch.

Named tuples rather than dataclasses, whose import alone takes a tenth of what `mnemon plan` does.
"""

from typing import Final, NamedTuple

from mnemon.errors import CacheError

__all__ = [
    "BLOCK_TOKENS",
    "CODES",
    "PackedFormat",
    "Scheme",
    "SideFormat",
    "default_scheme",
    "padded_width",
]

#: Tokens that are quantized together; what is fewer stays dense.
BLOCK_TOKENS: Final = 64

_BITS: Final = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}
#: Names of the codes.
CODES: Final = tuple(_BITS)
_ALIGNMENT: Final = 64  # a block's bytes are a multiple: one cache line
_LANES: Final = 16
_GROUP: Final = 64
_FACTOR_BYTES: Final = 4


class _SchemeFields(NamedTuple):
    code: str
    axis: str
    group_size: int
    rotated: bool


class Scheme(_SchemeFields):
    """How one side of a layer (keys or values) of a certain width is stored.

    Args:
        code: ``int8``, ``int4``, ``int2`` (unsigned steps above a group's lowest number) or
            ``fp8`` (e4m3 times a scale).
        axis: what shares a scale: ``token``: `group_size` numbers of one token; ``channel``: one
            dimension over the 64 tokens of a block.
        group_size: numbers per group where the axis is ``token``, a multiple of 16; otherwise 0.
        rotated: a Hadamard rotation of the width comes before quantizing.

    Raises:
        CacheError: an unknown code or axis, or a group size that does not go with the axis.

    Source:
        Groups of a token: FlexGen (arXiv 2303.06865); of a channel: KIVI (arXiv 2402.02750);
        rotation: QuaRot (arXiv 2404.00456).
    """

    __slots__ = ()

    def __new__(
        cls, *, code: str, axis: str, group_size: int = 0, rotated: bool = False
    ) -> "Scheme":
        if code not in _BITS:
            raise CacheError(f"Unknown code {code!r}; expected one of {', '.join(CODES)}.")
        if axis not in ("token", "channel"):
            raise CacheError(f"Unknown axis {axis!r}; expected 'token' or 'channel'.")
        if (group_size != 0) if axis == "channel" else (group_size <= 0 or group_size % _LANES):
            raise CacheError(
                f"A group of {group_size} numbers along the axis {axis!r}: expected a multiple of "
                f"{_LANES} along 'token', and 0 along 'channel'."
            )
        return super().__new__(cls, code, axis, group_size, rotated)

    def facts(self) -> dict[str, str | int | bool]:
        """JSON-able; ``Scheme(**facts)`` is an equal scheme."""
        return self._asdict()

    @property
    def bits(self) -> int:
        return _BITS[self.code]

    @property
    def levels(self) -> int:
        """Steps between the lowest and the highest code."""
        return (1 << self.bits) - 1

    @property
    def has_zero(self) -> bool:
        """Whether a group has an offset beside its scale."""
        return self.code != "fp8"

    @property
    def scales_per_group(self) -> int:
        return 2 if self.has_zero else 1

    def num_groups(self, width: int) -> int:
        """Groups of one token (axis ``token``), or of one block (axis ``channel``)."""
        return padded_width(width) if self.axis == "channel" else -(-width // self.group_size)

    def codes_bytes(self, width: int) -> int:
        """Bytes of the codes of a block."""
        return BLOCK_TOKENS * padded_width(width) * self.bits // 8

    def scales_bytes(self, width: int) -> int:
        """Bytes of the float16 scales (and offsets) of a block."""
        groups = self.num_groups(width)
        each = 1 if self.axis == "channel" else BLOCK_TOKENS
        return 2 * groups * self.scales_per_group * each

    def block_bytes(self, width: int) -> int:
        """Bytes of a block: codes, then scales, rounded up to whole cache lines."""
        size = self.codes_bytes(width) + self.scales_bytes(width)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def stored_bytes(self, width: int, num_blocks: int) -> int:
        """Bytes of `num_blocks` blocks of one head, their factors included."""
        return num_blocks * (self.block_bytes(width) + _FACTOR_BYTES)


class SideFormat(NamedTuple):
    """How keys or values are stored, whatever their width.

    Args:
        code: see `Scheme`.
        axis: see `Scheme`.
        group: about how many numbers share a scale along the axis ``token``; the groups of a head
            are made equal.
        rotated: see `Scheme`.
    """

    code: str
    axis: str = "token"
    group: int = _GROUP
    rotated: bool = False

    def scheme(self, width: int) -> Scheme:
        """The scheme for heads of `width` numbers."""
        size = 0
        if self.axis == "token":
            num_groups = max(1, width // self.group)
            size = padded_width(-(-width // num_groups))
        return Scheme(code=self.code, axis=self.axis, group_size=size, rotated=self.rotated)


class PackedFormat(NamedTuple):
    """How a layer is stored: keys, values, and the newest tokens, which stay dense.

    Args:
        keys: of the keys.
        values: of the values.
        residual: newest tokens that stay dense, at least: from that many to 63 more.
    """

    keys: SideFormat
    values: SideFormat
    residual: int = 64

    @property
    def name(self) -> str:
        """``int4``, or ``int4/int2`` for a pair."""
        keys, values = self.keys.code, self.values.code
        return keys if keys == values else f"{keys}/{values}"

    def num_blocks(self, num_tokens: int) -> int:
        """Whole blocks that `num_tokens` tokens, appended in whatever parts, come to."""
        return max(0, num_tokens - self.residual) // BLOCK_TOKENS

    @classmethod
    def named(cls, keys: str, values: str | None = None) -> "PackedFormat":
        """The format ``keys`` or ``keys/values`` with measured defaults.

        Raises:
            CacheError: an unknown name.
        """
        return cls(keys=_default(keys, True), values=_default(values or keys, False))

    def altered(
        self,
        *,
        residual: int | None = None,
        keys: str | None = None,
        values: str | None = None,
        rotated: bool | None = None,
        group: int | None = None,
    ) -> "PackedFormat":
        """The same with some settings changed: axes of `keys` and `values`, the keys' rotation,
        the size of groups along the axis ``token``."""
        sides = []
        for side, axis in ((self.keys, keys), (self.values, values)):
            sides.append(side._replace(axis=axis or side.axis, group=group or side.group))
        turned = sides[0].rotated if rotated is None else rotated
        return PackedFormat(
            keys=sides[0]._replace(rotated=turned),
            values=sides[1],
            residual=self.residual if residual is None else residual,
        )


# Chosen by `benchmarks/quality.py` on the bundled model and on keys with planted outliers: outlier
# channels do least harm in groups of their own; floats with an exponent hardly notice them.
_DEFAULT_KEYS: Final = {
    "int8": SideFormat(code="int8", axis="channel"),
    "int4": SideFormat(code="int4", axis="channel"),
    "int2": SideFormat(code="int2", axis="channel"),
    "fp8": SideFormat(code="fp8"),
}


def _default(code: str, is_keys: bool) -> SideFormat:
    if code not in _BITS:
        raise CacheError(f"Unknown format {code!r}; expected one of {', '.join(CODES)}.")
    return _DEFAULT_KEYS[code] if is_keys else SideFormat(code=code)


def padded_width(width: int) -> int:
    """`width` rounded up to the lanes of a vector; codes of the padding are 0."""
    return -(-width // _LANES) * _LANES


def default_scheme(code: str, width: int, *, is_keys: bool) -> Scheme:
    """The scheme of a format by its name, for a head of `width` numbers.

    Raises:
        CacheError: an unknown code.
    """
    return _default(code, is_keys).scheme(width)
