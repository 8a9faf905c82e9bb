"""What every config and model had: defaults and methods, against those of 4.57 where it runs."""

from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.cache_utils import DynamicCache

import mnemon
from mnemon.errors import ModelError
from mnemon.hf.names import PreTrainedConfig
from mnemon.legacy import old_models
from mnemon.legacy.old_configs import _DEFAULTS

IS_OLD = transformers.__version__.startswith("4.")


class Config(PreTrainedConfig):
    """As remote code writes it: nothing is passed to the base class."""

    model_type = "old_config"

    def __init__(self, hidden_size: int = 8, **kwargs: Any) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


def test_the_defaults_are_those_of_4_57() -> None:
    with mnemon.legacy.enable():
        config = Config()
        assert {name: getattr(config, name) for name in _DEFAULTS} == _DEFAULTS
        assert Config(tie_word_embeddings=False).tie_word_embeddings is False
        with pytest.raises(AttributeError, match="'Config' object has no attribute 'nothing'"):
            _ = config.nothing
        if not IS_OLD:
            assert "pruned_heads" not in config.to_dict()  # read, never written
    if not IS_OLD:
        assert not hasattr(Config(), "tie_word_embeddings")


@pytest.mark.skipif(IS_OLD, reason="its base class has the defaults for every config")
def test_transformers_own_configs_stay_as_they_are() -> None:
    own = PreTrainedConfig()
    before = {name for name in _DEFAULTS if hasattr(own, name)}
    with mnemon.legacy.enable():
        assert {name for name in _DEFAULTS if hasattr(own, name)} == before


@pytest.fixture(scope="module")
def bert() -> Any:
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, is_decoder=True,
    )  # fmt: skip
    return BertModel(config).eval()


MASKS = [torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), torch.ones(2, 3, 5).tril(2)]


@pytest.mark.parametrize("mask", MASKS, ids=["two", "three"])
@pytest.mark.parametrize("num_new", [5, 3])
def test_extended_masks(bert: Any, mask: torch.Tensor, num_new: int) -> None:
    ours = old_models.extended_attention_mask(bert, mask, (2, num_new), dtype=torch.float32)
    lowest = torch.finfo(torch.float32).min
    for row in range(2):
        for query in range(ours.shape[2]):
            for key in range(5):
                causal = mask.ndim == 3 or key <= 5 - num_new + query
                seen = bool(mask[row, query, key] if mask.ndim == 3 else mask[row, key]) and causal
                assert float(ours[row, 0, query, key]) == (0.0 if seen else lowest)
    if IS_OLD:
        theirs = bert.get_extended_attention_mask(mask, (2, num_new), dtype=torch.float32)
        assert torch.equal(ours, theirs)


def test_inverted_masks_and_head_masks(bert: Any) -> None:
    for mask in MASKS:
        ours = old_models.inverted_mask(bert, mask)
        assert ours.shape == (2, 1, 1 if mask.ndim == 2 else 3, 5)
        assert set(ours.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
        if IS_OLD:
            assert torch.equal(ours, bert.invert_attention_mask(mask))
    assert old_models.head_masks(bert, None, 3) == [None] * 3
    for heads in (torch.tensor([1.0, 0.0]), torch.rand(3, 2)):
        ours = old_models.head_masks(bert, heads, 3)
        assert ours.shape == (3, 1, 2, 1, 1)
        if IS_OLD:
            assert torch.equal(ours, bert.get_head_mask(heads, 3))
    for wrong in (torch.ones(2, 3, 4, 5), torch.ones(5)):
        with pytest.raises(ModelError, match=r"expected \[batch, tokens\]"):
            old_models.inverted_mask(bert, wrong)
    with pytest.raises(ModelError, match=r"expected \[heads\]"):
        old_models.head_masks(bert, torch.ones(1, 2, 3), 3)


def test_models_have_the_methods_while_it_is_on(bert: Any) -> None:
    with mnemon.legacy.enable():
        assert bert.get_head_mask(None, 2) == [None, None]
        assert bert.get_extended_attention_mask(MASKS[0], (2, 5)).shape == (2, 1, 5, 5)
        assert bert.invert_attention_mask(MASKS[0]).shape == (2, 1, 1, 5)
    assert hasattr(PreTrainedModel, "get_head_mask") == IS_OLD


@pytest.mark.filterwarnings("ignore::mnemon.legacy.LegacyWarning")
def test_a_cache_given_to_from_legacy_cache() -> None:
    """Llama's file of 4.40 asks for it whatever came."""
    states = torch.ones(1, 2, 3, 4)
    held = DynamicCache()
    held.update(states, states, 0)
    with mnemon.legacy.enable():
        copy: Any = DynamicCache.from_legacy_cache(held)  # type: ignore[attr-defined]
        empty: Any = DynamicCache.from_legacy_cache(DynamicCache())  # type: ignore[attr-defined]
    assert torch.equal(copy.layers[0].keys, states)
    assert empty.get_seq_length() == 0
