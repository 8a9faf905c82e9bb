"""`Exported`: a model as files, with what is known about it, and the way to call it."""

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnemon.errors import ExportError
from mnemon.export.axes import Shapes
from mnemon.export.fits import check_axes
from mnemon.export.forms import CacheForm, accept_cache
from mnemon.export.held import HeldCache
from mnemon.export.manifest import MANIFEST, Manifest, read_config, read_manifest
from mnemon.export.report import Report
from mnemon.export.targets import Session, target
from mnemon.hf.names import PreTrainedConfig

__all__ = ["Exported", "ExportedOutput", "as_mask", "in_one_piece", "load_export"]


class ExportedOutput(NamedTuple):
    """What one call gives.

    Args:
        logits: [batch, query, vocabulary].
        past_key_values: a cache of the class that came; a `mnemon.Cache` where none did, a
            `HeldCache` where the graph itself keeps what is cached.
    """

    logits: Tensor
    past_key_values: Any


class Exported:
    """An exported model.

    Call it like the model, ``exported(input_ids, attention_mask, past_key_values)``, or let
    `runner()` generate. `save` keeps its folder; until then it lies in a temporary one.

    Attributes:
        shapes: every axis of every input: its name or size, and the evidence.
        report: which shapes were compared with the model, the largest difference, what is refused.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, is_temporary: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        self.lock = threading.RLock()  # of the graph's own memory
        self._held: HeldCache | None = None  # whose tokens lie there
        if is_temporary:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def target(self) -> str:
        """What it was exported to."""
        return self.manifest.target

    @property
    def shapes(self) -> Shapes:
        """Every axis of every input."""
        return self.manifest.shapes

    @property
    def report(self) -> Report:
        """What was verified."""
        return self.manifest.report

    @property
    def form(self) -> CacheForm:
        """The cache as tensors."""
        return self.manifest.form

    @property
    def dtype(self) -> torch.dtype:
        """Of the cache's tensors."""
        dtype = getattr(torch, self.manifest.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's config.

        Raises:
            ExportError: of a type that transformers does not know in this process.
        """
        try:
            return read_config(self.folder)
        except (KeyError, OSError, ValueError) as error:
            raise ExportError(
                f"The config of this export cannot be read ({str(error).splitlines()[0][:200]}). "
                f"Import what registers the model's config, or pass a cache of your own: "
                f"mnemon.Cache(config)."
            ) from error

    @cached_property
    def sessions(self) -> dict[str, Session]:
        """The loaded parts, by name; loaded when first asked for."""
        kind = target(self.manifest.target)
        return {part.name: kind.load(part, self.folder) for part in self.manifest.parts}

    def __repr__(self) -> str:
        return f"Exported(target={self.target!r}, folder={str(self.folder)!r})"

    # -- running ---------------------------------------------------------------------------------

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> list[Any]:
        """Run the encoder part: the tensors that every decoder step reads."""
        part = next(part for part in self.manifest.parts if part.name == "encoder")
        check_axes(self.form, self.shapes, part, [input_ids, attention_mask])
        self._check_ids(input_ids)
        most = self.manifest.max_source
        if most is not None and input_ids.shape[1] > most:
            raise ExportError(
                f"{input_ids.shape[1]} tokens came; the model's encoder has {most} positions."
            )
        inputs = [_whole_numbers(input_ids), as_mask(attention_mask)]
        return self.sessions["encoder"].run(inputs)

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Sequence[Any],
        cross: Sequence[Any] = (),
        source_mask: Tensor | None = None,
        extras: Sequence[Tensor] = (),
    ) -> list[Any]:
        """Run the decoder part: logits, then the cache's tensors. Shapes are not checked."""
        masks = [] if source_mask is None else [as_mask(source_mask)]
        others = [in_one_piece(one) for one in extras]
        return self.sessions["decoder"].run(
            [
                _whole_numbers(input_ids),
                *past,
                as_mask(attention_mask),
                *cross,
                *masks,
                *others,
            ]
        )

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **extras: Tensor,
    ) -> ExportedOutput:
        """One forward pass.

        Args:
            input_ids: [batch, query], of the decoder.
            attention_mask: [batch, past + query], 0 where padded; all ones if None.
            past_key_values: a cache; None for an empty one. It is filled and returned. Tensors that
                do not lie in one piece are copied first.
            encoder_input_ids: [batch, source], of an encoder-decoder model's first call only.
            encoder_attention_mask: [batch, source]; on the first call all ones if None, later that
                of the first call.
            extras: further inputs, as the samples had them.

        Raises:
            ExportError: a shape that the export does not serve, or an input that is missing.
        """
        form = self.form
        self._check_ids(input_ids)
        cache = past_key_values
        if form.is_static:
            cache = self._own(cache)
        else:
            cache = accept_cache(form, lambda: self.config, cache)
        seen = (
            int(cache.get_seq_length())
            if self._counts
            else self._seen_by_mask(input_ids, attention_mask, cache)
        )
        past = self._past(input_ids, cache)
        if attention_mask is None:
            attention_mask = torch.ones(
                (input_ids.shape[0], seen + input_ids.shape[1]), dtype=torch.int64
            )
        if attention_mask.ndim != 2 or attention_mask.shape[1] != seen + input_ids.shape[1]:
            raise ExportError(
                f"attention_mask has shape {list(attention_mask.shape)}; it covers the {seen} "
                f"tokens of the cache and the {input_ids.shape[1]} new ones: "
                f"[batch, {seen + input_ids.shape[1]}]."
            )
        cross: list[Any] = []
        source_mask = None
        if form.has_cross:
            cross, source_mask = self._source(
                input_ids, cache, encoder_input_ids, encoder_attention_mask
            )
        elif encoder_input_ids is not None or encoder_attention_mask is not None:
            raise ExportError("encoder_input_ids came; the exported model has no encoder.")
        others = self._extras(extras)
        self.check_call(input_ids, attention_mask, past, cross, source_mask, others)
        if isinstance(cache, HeldCache):
            with self.lock:
                if past_key_values is None:
                    self.claim(cache)
                self.check_held(cache)
                cache.is_current = False  # until the pass is done
                logits, _ = self.feed(input_ids, attention_mask, [], cross, source_mask, others)
                cache.advance(seen + input_ids.shape[1], input_ids.shape[0], cross)
        else:
            logits, held = self.feed(input_ids, attention_mask, past, cross, source_mask, others)
            session = self.sessions["decoder"]
            form.fill(cache, [session.tensor(one) for one in held], seen + input_ids.shape[1])
            if form.has_cross:
                form.fill_cross(cache, cross)
        if source_mask is not None:  # the next call reads the same source
            kept = cross if isinstance(cache, HeldCache) else form.cross_tensors(cache)
            cache.source_mask = (source_mask, list(kept), _marks(kept))
        return ExportedOutput(logits, cache)

    def feed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Sequence[Any],
        cross: Sequence[Any] = (),
        source_mask: Tensor | None = None,
        extras: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Any]]:
        """`step` as often as the graph wants it: once, or for every token where it takes one at a
        time. Returns logits [batch, query, vocabulary], and the cache's tensors."""
        session, held = self.sessions["decoder"], list(past)
        if not self.form.takes_one_token or input_ids.shape[1] == 1:
            logits, *held = self.step(input_ids, attention_mask, past, cross, source_mask, extras)
            return session.tensor(logits), held
        seen, found = attention_mask.shape[1] - input_ids.shape[1], []
        for index in range(input_ids.shape[1]):
            ids, mask = input_ids[:, index : index + 1], attention_mask[:, : seen + index + 1]
            some = [one[:, index : index + 1] for one in extras]
            logits, *held = self.step(ids, mask, held, cross, source_mask, some)
            found.append(session.tensor(logits))
        return torch.cat(found, dim=1), held

    def claim(self, handle: HeldCache) -> None:
        """The graph's own memory is this handle's from here on; all others are refused."""
        if self._held is not None:
            self._held.is_current = False
        self._held = handle

    def check_held(self, handle: HeldCache) -> None:
        """Raise `ExportError` unless the graph's own memory is this handle's."""
        if handle is not self._held or not handle.is_current:
            raise ExportError(
                "These tokens are no longer in the graph's memory: another sequence was begun, or "
                "a call failed, since. Begin again with past_key_values=None; what runs at the "
                "same time needs an export of its own (load_export)."
            )

    @property
    def _counts(self) -> bool:
        """Whether a cache of this form says how many tokens it saw."""
        return self.form.is_static or any(
            part.kind != "states" for layer in self.form.layers for part in layer
        )

    def _seen_by_mask(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> int:
        """States alone count no tokens: the mask says how many there were."""
        is_empty = not cache.has_previous_state()
        if is_empty:
            return 0
        if attention_mask is None:
            raise ExportError(
                "This model keeps states alone, which do not say how many tokens they saw: pass "
                "attention_mask [batch, seen + query]."
            )
        return int(attention_mask.shape[-1] - input_ids.shape[1])

    def _own(self, cache: Any) -> HeldCache:
        """The handle of what the graph holds.

        Raises:
            ExportError: another cache, or a handle of tokens that were written over since.
        """
        if cache is None:
            return HeldCache()
        if not isinstance(cache, HeldCache):
            raise ExportError(
                f"A {type(cache).__name__} came; {self.form.recipe} is kept inside the graph: pass "
                f"None to begin, then what the call before returned."
            )
        self.check_held(cache)
        return cache

    def _source(
        self, input_ids: Tensor, cache: Any, encoder_ids: Tensor | None, mask: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The encoder's tensors for one call, and the mask that goes with them."""
        if bool(cache.is_updated.get(0)):
            if encoder_ids is not None:
                raise ExportError(
                    "The cache holds an encoded source already, and encoder_input_ids came: leave "
                    "them out, or start with an empty cache."
                )
            kept = cache.cross if isinstance(cache, HeldCache) else self.form.cross_tensors(cache)
            cross = [in_one_piece(one) for one in kept]
            wrong = next((one.dtype for one in cross if one.dtype != self.dtype), None)
            if wrong is not None:
                raise ExportError(f"The cache holds {wrong}; the export is of {self.dtype}.")
            if mask is None:
                known = getattr(cache, "source_mask", None)
                if known is None or known[2] != _marks(kept):
                    raise ExportError(
                        "The cache was not filled by this export, or its rows were moved since: "
                        "pass encoder_attention_mask, which says what of the source is padding."
                    )
                mask = known[0]
            return cross, mask
        if encoder_ids is None:
            raise ExportError("Nothing was encoded: the first call needs encoder_input_ids.")
        if mask is None:
            mask = torch.ones_like(encoder_ids)
        if encoder_ids.ndim == 2 and encoder_ids.shape[0] != input_ids.shape[0]:
            raise ExportError(
                f"encoder_input_ids has {encoder_ids.shape[0]} rows and input_ids "
                f"{input_ids.shape[0]}."
            )
        encoded = self.encode(encoder_ids, mask)
        return [self.sessions["encoder"].tensor(one) for one in encoded], mask

    def _extras(self, extras: Mapping[str, Tensor]) -> list[Tensor]:
        names = self.manifest.extras
        lacking = [name for name in names if name not in extras]
        unknown = sorted(extras.keys() - set(names))
        if lacking or unknown:
            raise ExportError(
                f"This export takes {list(names)} besides ids, mask and cache; missing: "
                f"{lacking}, not known: {unknown}."
            )
        found = []
        for name, dtype in names.items():
            given, wanted = extras[name], getattr(torch, dtype)
            if given.is_floating_point() != wanted.is_floating_point:
                raise ExportError(f"{name} is {given.dtype}; the export takes {wanted}.")
            found.append(given.to(wanted))
        return found

    def _past(self, input_ids: Tensor, cache: Any) -> list[Tensor]:
        if isinstance(cache, HeldCache):
            return []
        held = int(cache.get_seq_length()) if self._counts else int(cache.has_previous_state())
        if not held:
            return self.form.empty(input_ids.shape[0], self.dtype, input_ids.device)
        tensors = self.form.tensors(cache)
        for slot, one in zip(self.form.own_slots, tensors, strict=True):
            wanted = slot.torch_dtype(self.dtype)
            if one.dtype != wanted:
                raise ExportError(f"The cache holds {one.dtype}; the export is of {wanted}.")
        return [in_one_piece(one) for one in tensors]

    def check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Sequence[Any],
        cross: Sequence[Any] = (),
        source_mask: Tensor | None = None,
        extras: Sequence[Tensor] = (),
    ) -> None:
        """Refuse shapes that the graph does not serve: compiled code would not notice.

        Raises:
            ExportError: what came, what was expected.
        """
        tensors = [input_ids, *past, attention_mask, *cross]
        tensors += [] if source_mask is None else [source_mask]
        tensors += extras
        part = next(part for part in self.manifest.parts if part.name == "decoder")
        check_axes(self.form, self.shapes, part, tensors)
        self._check_room(attention_mask)

    def check_call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Sequence[Any],
        cross: Sequence[Any] = (),
        source_mask: Tensor | None = None,
        extras: Sequence[Tensor] = (),
        num_more: int = 0,
    ) -> None:
        """`check` for a call that may be fed token by token, and for `num_more` tokens after it.

        Raises:
            ExportError: what came, what was expected.
        """
        self._check_ids(input_ids)
        one_by_one = self.form.takes_one_token
        new = min(input_ids.shape[1], 1) if one_by_one else input_ids.shape[1]
        seen = attention_mask.shape[1] - input_ids.shape[1]
        mask = attention_mask[:, : seen + new]
        others = [one[:, :new] if one_by_one else one for one in extras]
        self.check(input_ids[:, :new], mask, past, cross, source_mask, others)
        self._check_room(attention_mask)
        batch, last = input_ids.shape[0], seen + input_ids.shape[1] + num_more
        begin = seen + new
        if (one_by_one and last > begin) or num_more:
            for held in {begin, last - 1}:
                later = self.form.empty(batch, self.dtype, "meta", held)
                ids = torch.empty((batch, 1), device="meta")
                longer = torch.empty((batch, held + 1), device="meta")
                few = [torch.empty((batch, 1), device="meta") for _ in extras]
                self.check(ids, longer, later, cross, source_mask, few)

    def _check_ids(self, input_ids: Tensor) -> None:
        """Ids are whole numbers of the vocabulary: a graph would take others for what they are not.

        Raises:
            ExportError: they are not.
        """
        if input_ids.ndim != 2:
            shape = list(input_ids.shape)
            raise ExportError(f"input_ids has shape {shape}; 2 axes were expected: batch, query.")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ExportError(f"input_ids is {input_ids.dtype}; whole numbers were expected.")
        most = self.manifest.vocab_size
        if most is None or not input_ids.numel():
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= most:
            raise ExportError(
                f"input_ids has {low if low < 0 else high}; the model's ids are 0 to {most - 1}."
            )

    def _check_room(self, attention_mask: Tensor) -> None:
        most, total = self.manifest.max_tokens, attention_mask.shape[-1]
        if most is not None and total > most:
            room = self.form.room
            what = "the model has" if room is None or room > most else f"{self.form.recipe} has"
            raise ExportError(f"{total} tokens came; {what} {most} positions.")

    def runner(self) -> Any:
        """A `Runner`, which generates."""
        from mnemon.export.runner import Runner

        return Runner(self)

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the export to `folder`, which must not exist or be empty; all of it or nothing.

        Raises:
            ExportError: there is something at `folder` already.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ExportError(f"{path} exists already; choose a new folder or empty it.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            raise ExportError(f"Cannot write beside {path}: {error}.") from error
        try:
            for name in (*self.manifest.files, MANIFEST):
                shutil.copy2(self.folder / name, fresh / name)
                with open(fresh / name, "rb") as file:
                    os.fsync(file.fileno())
            fresh.chmod(0o755)
            if path.exists():
                path.rmdir()
            fresh.rename(path)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ExportError(f"Cannot save to {path}: {error}. Nothing was written.") from error
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return path


def load_export(folder: str | os.PathLike[str]) -> Exported:
    """Load what `Exported.save` wrote. Nothing is unpickled; "aoti" loads native code.

    Raises:
        ExportError: no export, a newer one, or files that changed since they were written.
    """
    path = Path(folder).resolve()
    return Exported(path, read_manifest(path))


def _whole_numbers(ids: Tensor) -> Tensor:
    """Ids and masks as they were traced: compiled code reads other dtypes as if they were those."""
    return ids.to(torch.int64).contiguous()


def as_mask(mask: Tensor) -> Tensor:
    """1 where a token is and 0 where it is padding, whatever numbers said so."""
    return (mask != 0).to(torch.int64).contiguous()


def _marks(tensors: Sequence[Any]) -> list[Any]:
    """What tells tensors from others, and from themselves after something was written to them."""
    return [
        (one.data_ptr(), tuple(one.shape), 0 if one.is_inference() else one._version)
        for one in tensors
        if isinstance(one, Tensor)
    ]


def in_one_piece(tensor: Any) -> Any:
    """In one piece: compiled code reads a tensor as if it were."""
    return tensor.contiguous() if isinstance(tensor, Tensor) else tensor
