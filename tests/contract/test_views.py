"""What was handed out keeps its numbers, in every mode of autograd."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from contract.kinds import KINDS, Kind, kind_named
from contract.oracle import Oracle, tokens
from mnemon import Cache
from mnemon.layers import DenseLayer, WindowLayer

Mode = Callable[[], AbstractContextManager[object]]
HEADS, WIDTH = 2, 512  # 1 MiB after 256 tokens of float32: such buffers are mapped


def big(count: int, seed: int = 0) -> torch.Tensor:
    """``[1, HEADS, count, WIDTH]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, HEADS, count, WIDTH, generator=generator)


def grow(layer: DenseLayer, times: int = 3) -> None:
    """Past several reallocations."""
    for seed in range(times):
        stored = layer.num_stored
        layer.append(big(stored + 700, seed + 10), big(stored + 700, seed + 20))


@pytest.mark.parametrize(
    "hold",
    [
        lambda keys: keys,
        lambda keys: keys[:, 1:, 100:, ::2],
        lambda keys: keys.numpy(),
        lambda keys: keys[0, 1].T,
        lambda keys: [keys[0], {"deep": keys[0, 1]}],
        lambda keys: torch.utils.dlpack.to_dlpack(keys),
        lambda keys: keys.untyped_storage(),
    ],
    ids=["view", "view-of-view", "numpy", "transposed", "in-a-list", "dlpack", "storage"],
)
def test_a_view_alone_keeps_its_numbers_when_the_buffer_grows(
    hold: Callable[[torch.Tensor], object],
) -> None:
    """Pages are given back while a buffer grows; never those that somebody can still read."""
    layer = DenseLayer()
    first = big(600)
    keys, values = layer.append(first, first)
    assert layer.nbytes_reserved > 2 << 20
    held = hold(keys)
    expected = hold(first.clone())
    skip = keys.storage_offset()
    assert skip == 0
    shape, stride = keys.shape, keys.stride()
    del keys, values
    grow(layer)
    if isinstance(held, torch.UntypedStorage):
        seen = torch.empty(0).set_(held, 0, shape, stride)
        assert torch.equal(seen, first)
    elif isinstance(held, list):
        assert torch.equal(held[0], first[0])
        assert torch.equal(held[1]["deep"], first[0, 1])
    elif type(held).__name__ == "PyCapsule":
        assert torch.equal(torch.utils.dlpack.from_dlpack(held), first)
    else:
        assert torch.equal(torch.as_tensor(held), torch.as_tensor(expected))


def test_views_handed_out_at_every_step_keep_their_numbers() -> None:
    layer, everything = DenseLayer(), torch.empty(1, HEADS, 0, WIDTH)
    handed: list[torch.Tensor] = []
    for step in range(40):
        new = big(1 if step % 5 else 400, step)
        everything = torch.cat([everything, new], dim=-2)
        keys, values = layer.append(new, -new)
        handed += [keys] if step % 2 else [values]
    for step, view in enumerate(handed):
        sign = 1 if step % 2 else -1
        assert torch.equal(view, sign * everything[:, :, : view.shape[-2]])


@pytest.mark.parametrize("drop_original", [True, False])
def test_forks_and_their_views_survive_each_other(drop_original: bool) -> None:
    layer = DenseLayer()
    first = big(600)
    layer.append(first, first)
    fork = layer.fork()
    ours, _ = layer.append(big(3, 1), big(3, 1))
    if drop_original:
        del layer
    grow(fork)
    assert torch.equal(ours, torch.cat([first, big(3, 1)], -2))
    view = fork.view()
    assert view is not None
    assert torch.equal(view[0][:, :, :600], first)
    assert torch.equal(view[0][:, :, 600:1900], big(1300, 10))


@pytest.mark.parametrize("count", [4, 700])
def test_a_dropped_forks_view_is_not_written_over(count: int) -> None:
    """Its tail lies where the other would append next."""
    layer = DenseLayer()
    first = big(count)
    layer.append(first, first)
    fork = layer.fork()
    theirs, _ = fork.append(big(2, 1), big(2, 1))
    del fork
    ours, _ = layer.append(big(2, 2), big(2, 2))
    assert torch.equal(theirs, torch.cat([first, big(2, 1)], -2))
    assert torch.equal(ours, torch.cat([first, big(2, 2)], -2))


def test_crop_then_append_reuses_the_memory() -> None:
    """Assisted decoding goes back every round: that must not copy."""
    layer = DenseLayer()
    keys, _ = layer.append(big(600), big(600))
    address = keys.data_ptr()
    for step in range(20):
        layer.append(big(4, step), big(4, step))
        layer.crop(3)
    view = layer.view()
    assert view is not None
    assert view[0].data_ptr() == address
    assert torch.equal(view[0][:, :, 600:], torch.cat([big(4, n)[:, :, :1] for n in range(20)], -2))


def test_a_window_keeps_what_it_handed_out() -> None:
    layer, everything = WindowLayer(300), torch.empty(1, HEADS, 0, WIDTH)
    handed = []
    for step in range(12):
        new = big(100, step)
        everything = torch.cat([everything, new], dim=-2)
        handed.append(layer.append(new, new)[0])
    for step, view in enumerate(handed):
        stop = 100 * (step + 1)
        assert torch.equal(view, everything[:, :, stop - view.shape[-2] : stop])


def test_appending_copies_nothing_but_the_new() -> None:
    layer = DenseLayer()
    keys, values = layer.append(big(600), big(600))
    before = keys.data_ptr(), values.data_ptr()
    for step in range(100):
        keys, values = layer.append(big(1, step), big(1, step))
    assert (keys.data_ptr(), values.data_ptr()) == before


def test_a_state_is_borrowed_until_the_first_write() -> None:
    keys = big(600)
    layer = DenseLayer()
    source = DenseLayer()
    source.append(keys, keys)
    state = source.state()
    layer.load_state(state)
    view = layer.view()
    assert view is not None
    assert view[0].data_ptr() == state.tensors["keys"].data_ptr()
    layer.append(big(1, 1), big(1, 1))
    layer.reorder(torch.tensor([0]))
    assert torch.equal(state.tensors["keys"], keys)


# -- modes of autograd -----------------------------------------------------------------------------

MODES: dict[str, Mode] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_layers_cross_modes(kind: Kind, first: str, second: str) -> None:
    layer, oracle = kind.make(), Oracle()
    with MODES[first]():
        kind.feed(layer, oracle, tokens(2, 4).to(torch.float32))
        layer.reorder(torch.tensor([1, 0]))
        oracle.select([1, 0])
    with MODES[second]():
        kind.feed(layer, oracle, tokens(2, 1, 1).to(torch.float32))
        layer.repeat(2)
        oracle.repeat(2)
        kind.feed(layer, oracle, tokens(4, 3, 2).to(torch.float32))
        kind.check(layer, oracle)
    with MODES[first]():
        kind.feed(layer, oracle, tokens(4, 2, 3).to(torch.float32))
        kind.check(layer.fork(), oracle)
    kind.check(layer, oracle)


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_what_was_read_can_be_saved_for_backward(mode: str) -> None:
    """A prompt prefilled without gradients, then trained against (prompt tuning)."""
    layer = DenseLayer()
    with MODES[mode]():
        prompt = torch.randn(1, 2, 6, 4)
        layer.append(prompt, prompt)
    query = torch.randn(1, 2, 1, 4, requires_grad=True)
    keys, values = layer.append(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    ((query @ keys.transpose(-1, -2)) @ values).sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_dynamic_layer(frozen: bool) -> None:
    """`frozen`: the first part needs no gradient, the second does."""
    grads = []
    for layer in (DenseLayer(), DynamicLayer()):
        append = layer.append if isinstance(layer, DenseLayer) else layer.update
        torch.manual_seed(0)
        parts = [torch.randn(2, 2, n, 4, requires_grad=n != 5 or not frozen) for n in (5, 1, 3)]
        total = torch.zeros(())
        for number, part in enumerate(parts):
            keys, values = append(part, part * 2)
            total = total + (keys.softmax(-1) * values * (number + 1)).sum()
        total.backward()
        grads.append([part.grad for part in parts])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_training_through_a_cache() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.arange(24).view(2, 12)
    grads = []
    for cache in (Cache(config), None):
        model.zero_grad()
        losses = []
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            losses.append(out.logits.float().logsumexp(-1).mean())
        sum(losses).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_trained_through_cache_goes_on_without_gradients() -> None:
    layer = DenseLayer()
    first = torch.randn(1, 2, 3, 4, requires_grad=True)
    layer.append(first, first)
    with torch.no_grad():
        for _ in range(3):
            keys, _ = layer.append(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    assert keys.shape[-2] == 6
    assert torch.equal(keys[:, :, :3], first)
    layer.crop(4)
    layer.reorder(torch.tensor([0]))
    assert layer.num_tokens == 2


# -- recording: what may be taken back -------------------------------------------------------------


@pytest.mark.parametrize("name", ["window", "window+conv", "conv"])
@pytest.mark.parametrize("before", [0, 2, 9])
@pytest.mark.parametrize(("count", "removed"), [(1, 1), (4, 2), (4, 4), (7, 5), (3, 0)])
def test_recorded_tokens_can_go_back(name: str, before: int, count: int, removed: int) -> None:
    kind = kind_named(name)
    layer, oracle = kind.make(), Oracle()
    if before:
        kind.feed(layer, oracle, tokens(2, before).to(torch.float32))
    layer.set_recording(True)
    for step in range(4):
        kind.feed(layer, oracle, tokens(2, count, 1 + step).to(torch.float32))
        assert layer.can_crop(removed)
        layer.crop(removed)
        oracle.crop(removed)
    layer.set_recording(False)
    kind.check(layer, oracle)
    kind.feed(layer, oracle, tokens(2, 2, 9).to(torch.float32))
    kind.check(layer, oracle)


@pytest.mark.parametrize("name", ["window", "conv", "window+conv"])
def test_no_more_goes_back_than_was_recorded(name: str) -> None:
    kind = kind_named(name)
    layer, oracle = kind.filled(tokens(2, 20).to(torch.float32))
    layer.set_recording(True)
    kind.feed(layer, oracle, tokens(2, 2, 1).to(torch.float32))
    assert layer.can_crop(2)
    assert not layer.can_crop(3)
    layer.crop(1)
    oracle.crop(1)
    assert not layer.can_crop(2)


@pytest.mark.parametrize("name", ["window", "conv"])
def test_recording_is_bounded(name: str) -> None:
    """transformers' sliding cache grows without limit while it records."""
    kind = kind_named(name)
    layer, _ = kind.filled(tokens(1, 8).to(torch.float32))
    layer.set_recording(True)
    new = tokens(1, 300, 1).to(torch.float32)
    sizes = []
    for _ in range(12):
        with nullcontext():
            if name == "conv":
                layer.update_conv_state(new.flatten(2).transpose(1, 2), 0, 3)
            else:
                keys = new[..., :4].transpose(1, 2)
                values = new[..., 4:].transpose(1, 2)
                layer.append(keys, values)
        sizes.append(layer.nbytes)
    assert sizes[-1] == sizes[5]
    layer.set_recording(False)
    assert layer.nbytes < sizes[-1] / 100
