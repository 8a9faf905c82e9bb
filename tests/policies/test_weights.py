"""Sums of attention weights, against weights written out in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.attention import weights as module
from mnemon.attention.reference import attention
from mnemon.attention.watched import Seen, Watch, WatchedTensor
from mnemon.attention.weights import column_weights, last_weights
from mnemon.errors import CacheError
from mnemon.layers import PackedLayer
from mnemon.recipe import parse

BATCH, HEADS, KV_HEADS, WIDTH = 2, 6, 2, 16


def numbers(num_new: int, tokens: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(num_new)
    query = torch.randn(BATCH, HEADS, num_new, WIDTH, generator=draw)
    return query, torch.randn(BATCH, KV_HEADS, tokens, WIDTH, generator=draw)


def written_out(query: Tensor, keys: Tensor, **options: Any) -> Tensor:
    """[batch, kv_heads, group, new, tokens]: the weights are what attention makes of one-hots."""
    eye = torch.eye(keys.shape[2]).expand(*keys.shape[:3], keys.shape[2])
    return attention(query, keys, eye, **options).unflatten(1, (KV_HEADS, -1))


def options_named(name: str, num_new: int, tokens: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    match name:
        case "mask":
            seen = torch.rand(BATCH, 1, num_new, tokens, generator=draw) > 0.4
            return {"mask": seen, "scale": 0.7}
        case "numbers":
            seen = torch.rand(BATCH, 1, num_new, tokens, generator=draw) > 0.4
            seen[..., 0] = True
            return {"mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min)}
        case "everything":
            bias = torch.randn(1, HEADS, num_new, tokens, generator=draw)
            sinks = torch.randn(HEADS, generator=draw)
            return {"bias": bias, "sinks": sinks, "softcap": 1.5, "causal": True}
    return {"causal": name == "causal"}


@pytest.mark.parametrize("name", ["plain", "causal", "mask", "numbers", "everything"])
@pytest.mark.parametrize(("num_new", "tokens"), [(1, 9), (7, 7), (5, 12)])
@pytest.mark.parametrize("at_once", [1 << 23, 200])
def test_column_weights(
    name: str, num_new: int, tokens: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", at_once)
    query, keys = numbers(num_new, tokens)
    options = options_named(name, num_new, tokens)
    whole = written_out(query, keys, **options)
    found = column_weights(query, keys, num_new=num_new, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole.sum((2, 3)).float(), rtol=1e-4, atol=1e-5)
    last = last_weights(query, keys, num_new=num_new, **options)
    torch.testing.assert_close(last, whole[:, :, :, -1].sum(2).float(), rtol=1e-4, atol=1e-5)


def test_queries_of_padding_do_not_count() -> None:
    query, keys = numbers(6, 9)
    seen = torch.ones(6, 9, dtype=torch.bool).tril(3)[None, None].expand(BATCH, 1, -1, -1)
    padding = torch.zeros(BATCH, 6, dtype=torch.bool)
    padding[0, :2] = padding[1, 4:] = True
    whole = written_out(query, keys, mask=seen) * ~padding[:, None, None, :, None]
    found = column_weights(query, keys, num_new=6, padding=padding, mask=seen)
    torch.testing.assert_close(found, whole.sum((2, 3)).float(), rtol=1e-4, atol=1e-5)
    last = last_weights(query, keys, num_new=6, padding=padding, mask=seen)
    expected = torch.stack([whole[0, :, :, 5].sum(1), whole[1, :, :, 3].sum(1)]).float()
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["int8(residual=0)", "int4", "int4(keys=token, rotate=yes)"])
@pytest.mark.parametrize("num_new", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_keys(form: str, num_new: int, dtype: torch.dtype) -> None:
    packed = parse(form).packed
    assert packed is not None
    layer = PackedLayer(packed)
    _, keys = numbers(3, 1300)
    layer.append(keys.to(dtype), keys.to(dtype))
    layer.keep(torch.arange(17, 1300))  # blocks that begin elsewhere
    query, _ = numbers(num_new, 4)
    held = layer.keys
    assert held is not None
    found = column_weights(query.to(dtype), held, num_new=num_new, causal=True)
    whole = written_out(query.to(dtype), held.clone(), causal=True)
    within = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, whole.sum((2, 3)).float(), rtol=within, atol=within)


# -- who is told -----------------------------------------------------------------------------------


class Noting(Watch):
    """Writes down what it is told."""

    def __init__(self, keys: Tensor, num_new: int, visible: Tensor | None = None) -> None:
        self.wants = "sums"
        self.shape = tuple(keys.shape)  # type: ignore[assignment]
        self.num_new = num_new
        self.visible = visible
        self.seen: list[Seen] = []
        self.reads = 0

    @property
    def is_open(self) -> bool:
        return not self.seen

    def told(self, seen: Seen) -> None:
        self.seen.append(seen)

    def was_read(self) -> None:
        self.reads += 1


def watched(num_new: int = 3, tokens: int = 8) -> tuple[Tensor, WatchedTensor, Noting]:
    query, keys = numbers(num_new, tokens)
    watch = Noting(keys, num_new)
    return query, WatchedTensor(keys, watch), watch


def test_torch_is_heard_through_what_models_do_to_keys() -> None:
    query, keys, watch = watched()
    mask = torch.ones(3, 8, dtype=torch.bool).tril(5)[None, None]
    group = HEADS // KV_HEADS
    repeated = keys[:, :, None].expand(-1, -1, group, -1, -1).reshape(BATCH, HEADS, 8, WIDTH)
    plain = keys.content.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(query, repeated.contiguous(), plain, mask)
    expected = F.scaled_dot_product_attention(query, plain, plain, mask)
    assert torch.equal(out, expected)
    (seen,) = watch.seen
    assert watch.reads == 0
    assert seen.padding is None
    assert not seen.is_biased
    whole = written_out(query, keys.content, mask=mask).sum((2, 3))
    assert seen.weights is not None
    torch.testing.assert_close(seen.weights, whole.float(), rtol=1e-4, atol=1e-5)
    keys.sum()  # nobody is told twice, and reading is free once it was told
    assert watch.reads == 0


def test_what_is_not_attention_over_these_keys_is_a_read() -> None:
    query, keys, watch = watched()
    torch.matmul(query[:, :KV_HEADS], keys.transpose(-1, -2))
    assert (watch.reads, watch.seen) == (1, [])
    tiled = keys.repeat(1, 3, 1, 1)  # not as `repeat_kv` does
    F.scaled_dot_product_attention(query, tiled, tiled)
    cut = keys[:, :, :5]
    F.scaled_dot_product_attention(query, cut.repeat_interleave(3, 1), tiled[:, :, :5])
    F.scaled_dot_product_attention(query, keys.repeat_interleave(3, 1), tiled, is_causal=True)
    mixed = WatchedTensor(tiled.clone(), watch)
    F.scaled_dot_product_attention(query, mixed, tiled)
    assert watch.seen == []
    assert watch.reads >= 5


def test_padding_and_biases_are_seen() -> None:
    query, keys, watch = watched(3, 3)
    values = keys.content.repeat_interleave(3, 1)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None].repeat(BATCH, 1, 1, 1)
    mask[1, :, :, 0] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)
    F.scaled_dot_product_attention(query, keys.repeat_interleave(3, 1), values, added)
    assert watch.seen[0].padding is not None
    assert watch.seen[0].padding.tolist() == [[False] * 3, [True, False, False]]
    assert not watch.seen[0].is_biased
    query, keys, watch = watched(3, 3)
    added = added + 0.1 * torch.randn(added.shape)
    F.scaled_dot_product_attention(query, keys.repeat_interleave(3, 1), values, added)
    assert watch.seen[0].is_biased


def test_a_mask_that_does_not_fit_is_mended_or_the_read_refused() -> None:
    query, keys = numbers(1, 6)
    visible = torch.ones(BATCH, KV_HEADS, 5, dtype=torch.bool)
    visible[0, 0, 2] = False
    told = WatchedTensor(keys, Noting(keys, 1, visible))
    values = keys.repeat_interleave(3, 1)
    wrong = torch.zeros(BATCH, 1, 1, 6, dtype=torch.bool)
    wrong[..., -1] = True
    right = torch.ones(BATCH, HEADS, 1, 6, dtype=torch.bool)
    right[0, :3, 0, 2] = False
    expected = F.scaled_dot_product_attention(query, values, values, right)
    for mask in (wrong, None, torch.zeros(wrong.shape).masked_fill(~wrong, torch.finfo().min)):
        out = F.scaled_dot_product_attention(query, told.repeat_interleave(3, 1), values, mask)
        torch.testing.assert_close(out, expected)
    unheard = WatchedTensor(keys, Noting(keys, 1, visible))
    with pytest.raises(CacheError, match=r"mnemon\.attach"):
        torch.matmul(query[:, :KV_HEADS], unheard.transpose(-1, -2))
