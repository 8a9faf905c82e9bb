"""Whatever touches a packed tensor sees its numbers, and nothing can write to it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from mnemon.errors import CacheError
from mnemon.formats import PackedHalf, PackedSide, PackedTensor, default_scheme, quantize_blocks


def half(dtype: torch.dtype = torch.float32, num_skipped: int = 5, width: int = 16) -> PackedHalf:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 128, width, generator=generator)
    scheme = default_scheme("int4", width, is_keys=True)
    blocks, factors = quantize_blocks(x, scheme, is_keys=True)
    side = PackedSide(blocks=blocks, factors=factors, scheme=scheme, width=width, is_keys=True)
    tail = torch.randn(2, 2, 9, width, generator=generator).to(dtype)
    return PackedHalf(side=side, tail=tail, num_skipped=num_skipped)


def test_facts_need_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = PackedTensor(half(torch.bfloat16))

    def never(self: PackedHalf) -> torch.Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(PackedHalf, "dense", never)
    assert x.shape == (2, 2, 132, 16)
    assert x.size(-2) == x.shape[-2] == 132
    assert (x.ndim, x.dim(), len(x), x.numel()) == (4, 4, 2, 2 * 2 * 132 * 16)
    assert x.dtype == torch.bfloat16
    assert x.device.type == "cpu"
    assert not x.requires_grad
    assert x.is_floating_point()
    assert isinstance(x, torch.Tensor)
    assert "int4" in repr(x)
    assert hash(x) == hash(x)


def test_any_function_sees_the_numbers() -> None:
    x = PackedTensor(half())
    dense = x.dense()
    assert type(dense) is torch.Tensor
    assert torch.equal(x[:, :, 128 - 5 :], dense[:, :, 123:])
    for seen, expected in [
        (x + 1, dense + 1),
        (1 - x, 1 - dense),
        (x.transpose(1, 2), dense.transpose(1, 2)),
        (x[0, ..., 3:7, :], dense[0, ..., 3:7, :]),
        (x.to(torch.float64), dense.double()),
        (x.float(), dense),
        (x.half(), dense.to(torch.float16)),
        (x.bfloat16(), dense.bfloat16()),
        (x.contiguous(), dense),
        (x.clone(), dense),
        (x.detach(), dense),
        (torch.cat([x, x], 2), torch.cat([dense, dense], 2)),
        (x.repeat_interleave(3, 1), dense.repeat_interleave(3, 1)),
        (x[:, :, None].expand(2, 2, 3, 132, 16), dense[:, :, None].expand(2, 2, 3, 132, 16)),
        (torch.einsum("bhtd,bhtd->bht", x, x), (dense * dense).sum(-1)),
        (torch.from_numpy(x.numpy()), dense),
        (torch.utils.dlpack.from_dlpack(x), dense),
        (torch.tensor(x.tolist()), dense),
        (copy.deepcopy(x), dense),
        (pickle.loads(pickle.dumps(x)), dense),
        (F.softmax(x, -1), dense.softmax(-1)),
    ]:
        assert type(seen) is torch.Tensor
        torch.testing.assert_close(seen, expected)
    query = torch.randn(2, 4, 3, 16)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(query, x, x, enable_gqa=True),
        F.scaled_dot_product_attention(query, dense, dense, enable_gqa=True),
    )
    target = torch.zeros_like(dense)
    target.copy_(x)
    assert torch.equal(target, dense)
    target[:, :, :132] = x
    assert torch.equal(x == dense, torch.ones_like(dense, dtype=torch.bool))
    assert torch.equal(torch.zeros_like(x), torch.zeros_like(dense))
    assert x.data_ptr() != 0
    assert x.stride() == dense.stride()
    assert x.is_contiguous()
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file), dense)


def test_without_python_in_between() -> None:
    """Functions of torch that are called from C++ see the numbers too."""
    x = PackedTensor(half())
    with torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(torch.matmul(x, x.transpose(-1, -2)), x.dense() @ x.dense().mT)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(mode: type) -> None:
    with mode():
        x = PackedTensor(half())
        assert torch.equal(x * 2, x.dense() * 2)
    query = torch.randn(2, 2, 1, 16, requires_grad=True)
    (query @ PackedTensor(half()).mT).sum().backward()
    assert query.grad is not None


def test_gradients_reach_the_tail() -> None:
    one = half()
    tail = one.tail.clone().requires_grad_()
    x = PackedTensor(PackedHalf(side=one.side, tail=tail, num_skipped=5))
    (x * 3).sum().backward()
    assert torch.equal(tail.grad, torch.full_like(tail, 3.0))


def test_nothing_writes_to_it() -> None:
    x = PackedTensor(half())
    before = x.dense().clone()

    def assign() -> None:
        x[0] = 1

    def add() -> None:
        y = x
        y += 1

    for write in (
        lambda: x.mul_(2),
        lambda: x.zero_(),
        lambda: x.copy_(before),
        lambda: torch.add(before, 1, out=x),
        assign,
        add,
    ):
        with pytest.raises(CacheError, match="packed"):
            write()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(CacheError, match="packed"):
        x.mul_(2)
    assert torch.equal(x.dense(), before)


def test_halves_that_cannot_be() -> None:
    good = half()
    assert good.side is not None
    with pytest.raises(CacheError, match="skipped"):
        PackedHalf(side=good.side, tail=good.tail, num_skipped=64)
    with pytest.raises(CacheError, match="skipped"):
        PackedHalf(side=None, tail=good.tail, num_skipped=1)
    with pytest.raises(CacheError, match="belong together"):
        PackedHalf(side=good.side, tail=good.tail[:1])
    with pytest.raises(CacheError, match="expected uint8"):
        PackedSide(
            blocks=good.side.blocks[..., :-1], factors=good.side.factors,
            scheme=good.side.scheme, width=16, is_keys=True,
        )  # fmt: skip
    assert good.nbytes == good.side.nbytes + good.tail.numel() * 4
    assert good.num_tokens == 128 - 5 + 9
