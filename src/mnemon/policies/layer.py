"""A storage layer under a policy: tokens come, attention says what it saw, tokens go.

    append    [ stored | new ]  -> attention reads all of it, watched
    told      padding and weights of this call are noted; above the bound, the policy's lowest go
    after     [ stored ]        inside the bound again

The columns of the model's mask stay those of the stored tokens, because padding on the left goes
first: what went is always what came first in the mask. Where padding lies between a row's tokens
(a conversation in a padded batch) that ends, and the layer itself says what older tokens are.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from mnemon.attention.watched import Seen, Watch, WatchedTensor
from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.sliding import MAX_RECORDED
from mnemon.layers.tokens import check_mergeable
from mnemon.policies.base import Policy, Slots
from mnemon.policies.notes import Notes
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["PolicyLayer"]


@final
class PolicyLayer(CacheLayer):
    """`inner` with at most so many tokens as `policy` allows, whatever it stores them in.

    Tokens go when attention has run, in the same forward, some at a time (see `Bound`). What is
    appended by hand and attended to by nobody counts as real tokens, and goes at the next append.
    An attention that tells nothing is an error as soon as a token has to go, and so is one that
    adds numbers by position to the scores: dropping would move them.

    `crop` takes back tokens that came after the last drop; a policy that sums weights takes back
    none once it has seen some. While recording (assisted decoding) nothing is dropped before the
    next `crop`; policies that want weights refuse recording. `merge`, and `extract` of a padded
    row, are refused once tokens were dropped. Scores count as stored bytes.

    Args:
        inner: an empty layer that keeps every token and has `keep`.
        policy: which of them stay.
        layer_index: of the layer in its model; random choices depend on it.
    """

    def __init__(self, inner: CacheLayer, policy: Policy, layer_index: int = 0) -> None:
        self.kind = policy.kind
        self.inner = inner
        self.policy = policy
        self.layer_index = layer_index
        self._notes = Notes(scored=policy.keeps_scores)
        self._watch: _LayerWatch | None = None
        self._recording = False
        self._uncommitted = 0  # tokens since recording began or crop was called

    def _like(self, inner: CacheLayer, notes: Notes) -> "PolicyLayer":
        other = PolicyLayer(inner, self.policy, self.layer_index)
        other._notes = notes
        return other

    # -- keys and values -------------------------------------------------------------------------

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        if torch.compiler.is_compiling():
            raise CacheError(
                f"A cache under a policy ({self.kind}) cannot be part of a compiled graph, whose "
                f"lengths are fixed. Compile with static(n), or run this model without compiling."
            )
        self._close()
        if self._drops_first:
            self._drop()
        rows, past = self.inner.batch_size, self.inner.num_stored
        pair = self.inner.append(keys, values)
        num_new = keys.shape[2]
        if rows == 1 and keys.shape[0] > 1:
            self._notes.gather_rows(torch.zeros(keys.shape[0], dtype=torch.int64))
        self._notes.extend(keys)
        self._uncommitted += num_new
        if not num_new:
            return pair
        visible = self._notes.visible(past)
        self._watch = _LayerWatch(self, tuple(pair[0].shape), num_new, visible)
        return WatchedTensor(pair[0], self._watch), pair[1]

    def told(self, watch: "_LayerWatch", seen: Seen) -> None:
        """What attention saw of the newest append; called once, by its watch."""
        assert watch is self._watch
        self._watch = None
        notes, stored = self._notes, self.inner.num_stored
        notes.note_padding(seen.padding, watch.num_new, stored)
        notes.is_biased = notes.is_biased or seen.is_biased
        if self.policy.wants == "sums":
            assert seen.weights is not None
            self._score()
            notes.credit(seen.weights)
        if not self._recording:
            self._drop(seen.weights if self.policy.wants == "last" else None)

    @property
    def _drops_first(self) -> bool:
        """Whether tokens above the bound go before the next ones come."""
        return not self._recording or self._uncommitted > MAX_RECORDED

    def is_watched_by(self, watch: "_LayerWatch") -> bool:
        return self._watch is watch

    def _close(self) -> None:
        """Nobody told of the last append, and nobody will."""
        watch, self._watch = self._watch, None
        if watch is not None and (watch.read or self.policy.wants != "nothing"):
            self._notes.num_unseen += watch.num_new

    def _settle(self) -> None:
        """Before tokens or rows move: every token is known, with a score where it has one."""
        self._close()
        self._score()

    def _score(self) -> None:
        """Give a score to the tokens that have none yet: where it is needed, not at every step."""
        notes = self._notes
        if notes.num_unscored:
            positions = notes.unscored_positions(self.inner.num_tokens)
            scores = self.policy.first_scores(positions, notes.num_heads, self.layer_index)
            notes.put_scores(scores, self.inner.batch_size)

    def _drop(self, weights: Tensor | None = None) -> None:
        """Let the lowest go if more is stored than the policy allows.

        Raises:
            CacheError: what that takes is not known; nothing changed.
        """
        stored, seen = self.inner.num_stored, self.inner.num_tokens
        if stored <= self.policy.bound.most(seen):
            return
        if self.policy.wants == "last" and weights is None:
            if not self._notes.num_unseen:
                return  # attention is about to tell
        self._check_known()
        self._score()
        kept = min(self.policy.bound.least(seen), stored)
        padding = self._notes.padding()
        slots = Slots(stored, kept, self._notes.device, padding, self._notes.scores(), weights)
        rank = self.policy.rank(slots)
        if padding is not None:
            rank = rank.expand(padding.shape).masked_fill(padding, -torch.inf)
        # Ties go by time: the older token goes first.
        index = rank.argsort(dim=-1, stable=True)[..., stored - kept :].sort(dim=-1).values
        if index.shape[:2] == (1, 1):
            index = index[0, 0]
        else:
            index = index.expand(self.inner.batch_size, self._notes.num_heads, kept)
        self.inner.keep(index)
        self._notes.keep(index)
        self._notes.num_since_drop = 0

    def _check_known(self) -> None:
        if self._notes.num_unseen:
            wanted = "weights" if self.policy.wants != "nothing" else "mask"
            raise CacheError(
                f"The policy {self.kind} has to drop tokens and got no {wanted} from the attention "
                f"of {self._notes.num_unseen} of the {self.num_tokens} tokens seen, so it cannot "
                f"tell which. Call mnemon.attach(model) before the first forward (its report() "
                f"names attention that mnemon does not serve), reset() the cache and prefill "
                f"again; or leave the policy out."
            )
        if self._notes.is_biased:
            raise CacheError(
                f"This model's attention adds numbers by position to its scores (ALiBi, relative "
                f"positions), which would go to other tokens once the policy {self.kind} drops "
                f"some. Use a recipe without a policy."
            )

    def view(self) -> tuple[Keys, Values] | None:
        return self.inner.view()

    @property
    def stored_as(self) -> str:
        return self.inner.stored_as

    @property
    def num_tokens(self) -> int:
        return self.inner.num_tokens

    @property
    def num_stored(self) -> int:
        return self.inner.num_stored

    @property
    def max_length(self) -> int:
        return self.inner.max_length

    def mask_sizes(self, num_new: int) -> MaskSizes:
        stored, seen, bound = self.inner.num_stored, self.inner.num_tokens, self.policy.bound
        if self._drops_first and stored > bound.most(seen) and self.policy.wants != "last":
            stored = min(stored, bound.least(seen))
        return stored + num_new, seen - stored

    # -- going back, forgetting ------------------------------------------------------------------

    def can_crop(self, num_tokens: int) -> bool:
        since = self._notes.num_since_drop
        if num_tokens and self._notes.is_credited:
            return False  # sums hold what the queries that go have added
        return self.inner.can_crop(num_tokens) and (since is None or num_tokens <= since)

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            raise CacheError(self._why_not(num_tokens))
        self._settle()
        self.inner.crop(num_tokens)
        self._notes.crop(num_tokens, self.num_tokens)
        self._uncommitted = 0
        if self._recording:
            self._drop()

    def _why_not(self, num_tokens: int) -> str:
        if self._notes.is_credited:
            why = f"the scores of {self.kind} hold attention of the tokens that would go"
        else:
            since = self._notes.num_since_drop
            free = self.num_stored if since is None else since
            why = f"only the newest {free} came after {self.kind} last dropped tokens"
        return (
            f"Cannot remove {num_tokens} tokens: {why}. Call activate_past_recording() before "
            f"appending what may be taken back (policies without weights), or reset() and prefill "
            f"again."
        )

    def set_recording(self, on: bool) -> None:
        if on and self.policy.wants != "nothing":
            raise UnsupportedVerb(
                f"Assisted decoding takes tokens back, and {self.kind} chooses by what queries saw "
                f"that may be taken back too. Use window, sinks or random, or decode without an "
                f"assistant."
            )
        ends = self._recording and not on
        self.inner.set_recording(on)
        self._recording, self._uncommitted = on, 0
        if ends:
            self._settle()
            self._drop()

    @property
    def is_recording(self) -> bool:
        return self._recording

    @property
    def is_croppable(self) -> bool:
        return self.policy.wants == "nothing"

    def keep(self, indices: Tensor) -> None:
        self._settle()
        self.inner.keep(indices)
        self._notes.keep(indices.to(torch.int64), moves_padding=True)

    def reset(self) -> None:
        self.inner.reset()
        self._notes = Notes(scored=self.policy.keeps_scores)
        self._watch, self._recording, self._uncommitted = None, False, 0

    # -- rows ------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.inner.batch_size

    def reorder(self, index: Tensor) -> None:
        self._settle()
        self.inner.reorder(index)
        self._notes.gather_rows(index)

    def select(self, index: Tensor) -> None:
        if self.batch_size >= 0:
            index = row_index(index, self.batch_size)
            self._settle()
            self.inner.select(index)
            self._notes.gather_rows(index)

    def merge(self, others: Sequence["PolicyLayer"]) -> "PolicyLayer":
        check_mergeable([self, *others])
        if any(other.policy != self.policy for other in others):
            raise CacheError(f"Cannot merge layers under other settings of {self.kind}.")
        for layer in (self, *others):
            layer._settle()
        inner = self.inner.merge([other.inner for other in others])
        sizes = [(layer.batch_size, layer.num_stored) for layer in (self, *others)]
        return self._like(inner, self._notes.merged([one._notes for one in others], sizes))

    def extract(self, row: int, num_padding: int = 0) -> "PolicyLayer":
        self._settle()
        inner = self.inner.extract(row, num_padding)
        if self.batch_size < 0:
            return self._like(inner, self._notes.fork())
        rows = row_index(torch.tensor([row]), self.batch_size)
        notes = self._notes.row(rows, num_padding)
        notes.num_unseen = min(notes.num_unseen, inner.num_tokens)
        return self._like(inner, notes)

    def fork(self) -> "PolicyLayer":
        self._settle()
        other = self._like(self.inner.fork(), self._notes.fork())
        other._recording, other._uncommitted = self._recording, self._uncommitted
        return other

    # -- bytes -----------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {"settings": dict(self.policy.settings), "layer_index": self.layer_index}

    def state(self) -> LayerState:
        self._settle()
        return LayerState(
            kind=self.kind,
            tensors=self._notes.tensors(),
            meta=self._facts() | self._notes.facts(),
            parts=(self.inner.state(),),
        )

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        given: Mapping[str, Any] = {name: state.meta.get(name) for name in self._facts()}
        if given["settings"] != self._facts()["settings"] or len(state.parts) != 1:
            raise CacheError(
                f"A saved {self.kind} layer has settings {given['settings']} and "
                f"{len(state.parts)} parts; this one has {self._facts()['settings']}."
            )
        if given["layer_index"] != self.layer_index:
            raise CacheError(
                f"This is layer {self.layer_index} of the model, the saved one was layer "
                f"{given['layer_index']}."
            )
        before = self.inner.fork()
        try:
            self.inner.load_state(state.parts[0])
            notes = Notes.of(state, self.inner, scored=self.policy.keeps_scores)
        except BaseException:
            self.inner = before
            raise
        self._notes = notes
        self._watch, self._recording, self._uncommitted = None, False, 0

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self._beside

    @property
    def _beside(self) -> int:
        return self._notes.nbytes + self._notes.unscored_bytes(self.batch_size)

    @property
    def nbytes_reserved(self) -> int:
        beside = self._notes.nbytes_reserved + self._notes.unscored_bytes(self.batch_size)
        return self.inner.nbytes_reserved + beside

    def nbytes_by_place(self) -> dict[str, int]:
        places = dict(self.inner.nbytes_by_place())
        places["device"] = places.get("device", 0) + self._beside
        return places


@final
class _LayerWatch(Watch):
    """Watches one append to one layer, which may be gone when attention runs."""

    def __init__(
        self,
        layer: PolicyLayer,
        shape: tuple[int, ...],
        num_new: int,
        visible: Tensor | None,
    ) -> None:
        batch, heads, tokens, width = shape
        self.wants = layer.policy.wants
        self.shape = (batch, heads, tokens, width)
        self.num_new = num_new
        self.visible = visible
        self.read = False
        self._layer = weakref.ref(layer)

    @property
    def is_open(self) -> bool:
        layer = self._layer()
        return layer is not None and layer.is_watched_by(self)

    def told(self, seen: Seen) -> None:
        layer = self._layer()
        assert layer is not None
        layer.told(self, seen)

    def was_read(self) -> None:
        self.read = True
