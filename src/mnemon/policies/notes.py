"""What a layer under a policy remembers beside its tokens: padding, scores, and what was not seen.

    scores    [batch, kv_heads, stored, 1]   float32, under policies that keep some
    hidden    [batch, kv_heads, stored, 1]   bool, while padding may be stored

Both lie in buffers that grow in place and follow every verb as keys and values do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor

from mnemon.errors import CacheError
from mnemon.layers.base import CacheLayer, LayerState
from mnemon.layers.storage import TokenBuffer
from mnemon.layers.tokens import stack_right

__all__ = ["Notes"]

_FACTS: Final = ("num_since_drop", "num_unseen", "is_biased", "is_moved", "is_credited")


@final
class Notes:
    """What is known of the stored tokens of one layer.

    Args:
        scored: keep a score for every token and key head.

    Attributes:
        num_since_drop: tokens that came after the last drop; None before the first.
        num_unseen: tokens whose attention nobody told of.
        is_biased: attention adds numbers by position to its scores.
        is_moved: padding was dropped from between tokens: the model's mask no longer fits.
        is_credited: scores hold weights of queries.
        num_unscored: newest tokens that have no score yet.
        num_heads: key heads; 0 before the first append.
        device: of the tokens.
    """

    def __init__(self, *, scored: bool) -> None:
        self._scored = scored
        self._scores = TokenBuffer()
        self._hidden: TokenBuffer | None = None
        self._num_padding: Tensor | None = None  # int64 [batch], of all tokens seen
        self.num_since_drop: int | None = None
        self.num_unseen = 0
        self.is_biased = False
        self.is_moved = False
        self.is_credited = False
        self.num_unscored = 0
        self.num_heads = 0
        self.device = torch.device("cpu")

    # -- tokens come -----------------------------------------------------------------------------

    def extend(self, keys: Tensor) -> None:
        """Room for new tokens ``[batch, kv_heads, new, width]`` that are no padding so far."""
        self.num_heads, self.device = keys.shape[1], keys.device
        if self._scored:
            self.num_unscored += keys.shape[2]
        if self._hidden is not None:
            shape = (*keys.shape[:3], 1)
            self._hidden.append(torch.zeros(shape, dtype=torch.bool, device=keys.device))
        if self.num_since_drop is not None:
            self.num_since_drop += keys.shape[2]

    def note_padding(self, padding: Tensor | None, num_new: int, num_stored: int) -> None:
        """`padding` bool ``[batch, num_new]``: which of the newest tokens are padding."""
        if padding is None:
            return
        if self._hidden is None:
            shape = (padding.shape[0], self.num_heads, num_stored, 1)
            self._hidden = TokenBuffer()
            self._hidden.append(torch.zeros(shape, dtype=torch.bool, device=padding.device))
        self._hidden.tail(num_new).copy_(padding[:, None, :, None])
        count = padding.sum(dim=-1)
        self._num_padding = count if self._num_padding is None else self._num_padding + count

    def unscored_positions(self, num_tokens: int) -> Tensor:
        """int64 ``[batch or 1, num_unscored]`` of the newest tokens among the row's real ones."""
        count = self.num_unscored
        places = torch.arange(num_tokens - count, num_tokens, device=self.device)[None]
        if self._num_padding is None:
            return places
        if self._hidden is None or not count:
            return places - self._num_padding[:, None]
        hidden = self._hidden.tail(count)[:, 0, :, 0]
        before = num_tokens - count - self._num_padding + hidden.sum(dim=-1)
        return before[:, None] + (~hidden).cumsum(dim=-1) - 1

    def put_scores(self, scores: Tensor, batch_size: int) -> None:
        """Scores ``[batch or 1, kv_heads, num_unscored]`` of the newest tokens."""
        scores = scores.to(torch.float32).expand(batch_size, -1, -1)
        self._scores.append(scores[..., None].contiguous())
        self.num_unscored = 0

    def credit(self, weights: Tensor) -> None:
        """Add ``[batch, kv_heads, stored]`` to the scores."""
        live = self._scores.writable()
        assert live is not None
        live += weights[..., None]
        self.is_credited = True

    # -- what is known ---------------------------------------------------------------------------

    def scores(self) -> Tensor | None:
        """float32 ``[batch, kv_heads, stored]``."""
        live = self._scores.live() if self._scored else None
        return None if live is None else live[..., 0]

    def padding(self) -> Tensor | None:
        """bool ``[batch, kv_heads, stored]``; None where no padding is stored.

        Asked before tokens go: where padding lies behind a real token, the mask will not fit.
        """
        live = None if self._hidden is None else self._hidden.live()
        if live is None or not bool(live.any()):
            self._hidden = None
            return None
        hidden = live[..., 0]
        behind = hidden & ((~hidden).cumsum(dim=-1) > 0)
        self.is_moved = self.is_moved or bool(behind.any())
        return hidden

    def visible(self, num_past: int) -> Tensor | None:
        """bool ``[batch, kv_heads, num_past]`` of the oldest tokens, if the mask cannot say it."""
        if not self.is_moved or not num_past:
            return None
        live = None if self._hidden is None else self._hidden.live()
        if live is not None:
            return ~live[:, :, :num_past, 0]
        return torch.ones(1, self.num_heads, num_past, dtype=torch.bool, device=self.device)

    # -- tokens go, rows move --------------------------------------------------------------------

    def _buffers(self) -> list[TokenBuffer]:
        buffers = [self._scores] if self._hidden is None else [self._scores, self._hidden]
        return [buffer for buffer in buffers if not buffer.is_empty]

    def _check_scored(self) -> None:
        assert not self.num_unscored, "scores are put before tokens move"

    def keep(self, index: Tensor, *, moves_padding: bool = False) -> None:
        """Keep the tokens at `index`, as `CacheLayer.keep`."""
        self._check_scored()
        for buffer in self._buffers():
            buffer.gather_tokens(index)
        if moves_padding and self._num_padding is not None:
            self.is_moved = True

    def crop(self, num_tokens: int, num_left: int) -> None:
        """Forget the newest `num_tokens`; `num_left` tokens seen are left."""
        if num_tokens and self._hidden is not None and self._num_padding is not None:
            gone = self._hidden.tail(num_tokens)[:, 0, :, 0].sum(dim=-1)
            self._num_padding = self._num_padding - gone
        for buffer in self._buffers():
            buffer.crop(num_tokens)
        self._check_scored()
        if self.num_since_drop is not None:
            self.num_since_drop -= num_tokens
        self.num_unseen = min(self.num_unseen, num_left)

    def gather_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was."""
        for buffer in self._buffers():
            buffer.gather_rows(index)
        if self._num_padding is not None:
            self._num_padding = self._num_padding[index.to(self._num_padding.device)]

    def fork(self) -> "Notes":
        other = Notes(scored=self._scored)
        for name in (*_FACTS, "num_heads", "device"):
            setattr(other, name, getattr(self, name))
        other._scores = self._scores.fork()
        other._hidden = None if self._hidden is None else self._hidden.fork()
        other._num_padding = self._num_padding
        return other

    def row(self, rows: Tensor, num_padding: int) -> "Notes":
        """Of one row alone, without its first `num_padding` tokens."""
        other = self.fork()
        other.gather_rows(rows)
        if num_padding:
            if other._hidden is not None and other._num_padding is not None:
                first = other._hidden.live()
                assert first is not None
                gone = first[:, 0, :num_padding, 0].sum(dim=-1)
                other._num_padding = other._num_padding - gone
            for buffer in other._buffers():
                buffer.drop_first(num_padding)
        return other

    def merged(self, others: Sequence["Notes"], sizes: Sequence[tuple[int, int]]) -> "Notes":
        """Rows of all, aligned at the newest token; what `merge` pads counts as padding.

        `sizes`: rows and tokens of each, nothing having been dropped.
        """
        notes, longest = [self, *others], max(length for _, length in sizes)
        other = self.fork()
        other.num_unseen = max(one.num_unseen for one in notes)
        other.is_biased = any(one.is_biased for one in notes)
        other.is_credited = any(one.is_credited for one in notes)
        if not any(one.num_heads for one in notes):
            return other
        if self._scored and longest:
            other._scores.replace(stack_right([one._scores.live() for one in notes], longest))
        unequal = len({length for _, length in sizes}) > 1
        if unequal or any(one._num_padding is not None for one in notes):
            found = [one._padded(*size, longest) for one, size in zip(notes, sizes, strict=True)]
            other._hidden = TokenBuffer()
            other._hidden.append(torch.cat([hidden for hidden, _ in found]))
            other._num_padding = torch.cat([count for _, count in found])
        return other

    def _padded(self, rows: int, num_tokens: int, longest: int) -> tuple[Tensor, Tensor]:
        """What is padding once the rows are `longest` tokens long, and how many that are."""
        hidden = None if self._hidden is None else self._hidden.live()
        if hidden is None:
            shape = (rows, self.num_heads, num_tokens, 1)
            hidden = torch.zeros(shape, dtype=torch.bool, device=self.device)
        count = self._num_padding
        if count is None:
            count = torch.zeros(rows, dtype=torch.int64, device=self.device)
        missing = longest - num_tokens
        return torch.nn.functional.pad(hidden, (0, 0, missing, 0), value=True), count + missing

    # -- bytes -----------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of scores and padding."""
        return sum(buffer.nbytes for buffer in self._buffers())

    @property
    def nbytes_reserved(self) -> int:
        """Bytes allocated for them."""
        return sum(buffer.nbytes_reserved for buffer in self._buffers())

    def unscored_bytes(self, batch_size: int) -> int:
        """Bytes that scores will take which were not put yet."""
        return max(0, batch_size) * self.num_heads * self.num_unscored * 4

    def tensors(self) -> dict[str, Tensor]:
        """What a saved layer holds beside its tokens."""
        found = {
            "scores": self._scores.live(),
            "hidden": None if self._hidden is None else self._hidden.live(),
            "num_padding": self._num_padding,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def facts(self) -> dict[str, Any]:
        """JSON-able facts beside the tensors."""
        return {name: getattr(self, name) for name in _FACTS}

    @staticmethod
    def of(state: LayerState, inner: CacheLayer, *, scored: bool) -> "Notes":
        """The notes of a saved layer whose tokens `inner` holds; tensors are borrowed.

        Raises:
            CacheError: they contradict the tokens, or one another.
        """
        notes, tensors = Notes(scored=scored), state.tensors
        rows, stored = inner.batch_size, inner.num_stored
        facts = {name: state.meta.get(name) for name in _FACTS}
        view = inner.view()
        heads = 0 if view is None else view[0].shape[1]
        expected = {
            "scores": (torch.float32, (rows, heads, stored, 1)),
            "hidden": (torch.bool, (rows, heads, stored, 1)),
            "num_padding": (torch.int64, (rows,)),
        }
        given = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        needed = {"scores"} if scored and stored else set()
        if "hidden" in given:
            needed.add("num_padding")
        fits = needed <= set(given) <= set(expected) and (scored or "scores" not in given)
        if not (fits and all(expected[name] == found for name, found in given.items())):
            raise CacheError(
                f"A saved {state.kind} layer of {stored} tokens of {rows} rows has beside them "
                f"{given}; expected some of {expected}."
            )
        notes._hold(tensors, facts, state.kind, inner.num_tokens)
        notes.num_heads = heads
        notes.device = notes.device if view is None else view[0].device
        return notes

    def _hold(
        self,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        kind: str,
        num_tokens: int,
    ) -> None:
        since, unseen = facts["num_since_drop"], facts["num_unseen"]
        flags = [facts[name] for name in _FACTS if name.startswith("is_")]
        numbers = [unseen] if since is None else [unseen, since]
        if not all(type(flag) is bool for flag in flags) or not all(
            type(number) is int and 0 <= number <= num_tokens for number in numbers
        ):
            raise CacheError(f"A saved {kind} layer's facts {dict(facts)} contradict it.")
        for name, value in facts.items():
            setattr(self, name, value)
        if "scores" in tensors:
            self._scores.adopt(tensors["scores"])
        if "hidden" in tensors:
            self._hidden = TokenBuffer()
            self._hidden.adopt(tensors["hidden"])
        self._num_padding = tensors.get("num_padding")
