"""`Cache` on real tiny models: verbs over all layers, the token log, pairs, configs."""

import copy
import json
import pickle
from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    Gemma3Config,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache

from binding_models import bart, jamba, llama, llava, mamba, mistral, prompt
from mnemon import Cache, prefill
from mnemon.cache import CacheState, EncoderDecoderCache
from mnemon.errors import CacheError, ModelError, RecipeError, UnsupportedVerb
from mnemon.hf.names import PreTrainedConfig
from releases import RELEASE

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "mistral": lambda: mistral(window=8),
    "jamba": jamba,
    "mamba": mamba,
}
TOKEN_MODELS = ["llama", "mistral"]
RECIPES = ["", "static(96)"]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: make() for name, make in MODELS.items()}


def run(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """Feed `ids` behind what the cache holds and record them; logits of the last position."""
    name = "cache_params" if model.config.model_type == "mamba" else "past_key_values"
    start = cache.num_tokens
    held = torch.cat([cache.attention_mask().expand(ids.shape[0], -1), torch.ones_like(ids)], 1)
    positions = (held.cumsum(1) - 1).clamp_min(0)[:, start:]
    extra = {} if name == "cache_params" else {"position_ids": positions}
    if bool((held == 0).any()):
        extra["attention_mask"] = held
    with torch.no_grad():
        out = model(ids, use_cache=True, **{name: cache}, **extra)
    cache.record_tokens(ids, None, start)
    return out.logits[:, -1]


def greedy(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, steps: int = 6) -> list[int]:
    """Tokens after `ids`, one row."""
    found = []
    for _ in range(steps):
        ids = run(model, cache, ids).argmax(-1, keepdim=True)
        found.append(int(ids))
    return found


def content(cache: Cache) -> tuple[object, ...]:
    state = cache.to_state()

    def tensors(layers: object) -> list[list[torch.Tensor]]:
        found = []
        for layer in layers:  # type: ignore[attr-defined]
            found.append([tensor.clone() for tensor in layer.tensors.values()])
            found += tensors(layer.parts)
        return found

    return tensors(state.layers), tensors(state.cross), state.tokens.clone(), cache.num_tokens


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))  # type: ignore
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))  # type: ignore
    return one == other


# -- lengths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_an_empty_cache(models: dict[str, PreTrainedModel], name: str, recipe: str) -> None:
    cache = Cache(models[name].config, recipe)
    assert (cache.num_tokens, cache.num_stored, cache.batch_size) == (0, 0, -1)
    assert cache.nbytes == cache.nbytes_reserved == 0
    assert cache.tokens.shape == (1, 0)
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    cache.crop(0)
    cache.reset()
    with pytest.raises(CacheError):
        cache.crop(-1)
    assert cache.fork().num_tokens == 0
    assert "0 tokens seen" in str(cache.report())
    assert len(cache) == models[name].config.num_hidden_layers


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "mistral", "jamba"])
def test_a_saved_length_does_not_change(
    models: dict[str, PreTrainedModel], name: str, recipe: str
) -> None:
    """The length of transformers' static layer is a live tensor: 20 becomes 25 behind your back."""
    model = models[name]
    cache = Cache(model.config, recipe)
    run(model, cache, prompt(20))
    saved, offset = cache.get_seq_length(), cache.get_query_offset(0)
    run(model, cache, prompt(5, seed=2))
    assert type(saved) is int
    assert type(offset) is int
    assert (saved, offset) == (20, 20)
    assert cache.get_seq_length() == cache.num_tokens == 25
    if RELEASE < (5, 14):
        return
    theirs = transformers.StaticCache(models["llama"].config, max_cache_len=32)
    with torch.no_grad():
        models["llama"](prompt(20), past_key_values=theirs)
        before = theirs.get_seq_length()
        models["llama"](prompt(5), past_key_values=theirs)
    assert int(before) == 25


@pytest.mark.parametrize(("recipe", "compiles"), [("", False), ("static(64)", True)])
@pytest.mark.parametrize("name", ["llama", "mistral", "jamba"])
def test_flags(models: dict[str, PreTrainedModel], name: str, recipe: str, compiles: bool) -> None:
    cache = Cache(models[name].config, recipe)
    assert cache.is_compileable is compiles
    count = len(cache.layers)
    assert cache.is_sliding == [name == "mistral"] * count
    assert cache.is_linear == ([True, False] if name == "jamba" else [False] * count)
    assert cache.is_dummy == [False] * count
    bound = {"": {"mistral": 8}, "static(64)": {"mistral": 8, "llama": 64, "jamba": 64}}
    assert cache.get_max_length() == bound[recipe].get(name, -1)


# -- going back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_crop_convention(models: dict[str, PreTrainedModel], recipe: str) -> None:
    model = models["llama"]
    cache = Cache(model.config, recipe)
    run(model, cache, prompt(12))
    before = content(cache)
    if RELEASE < (5, 19):  # there, as in that release's own caches, it is a final size
        other = cache.fork()
        other.crop(5)
        assert torch.equal(other.tokens, prompt(12)[:, :5])
        other.crop(9)
        assert other.num_tokens == 5
    else:
        with pytest.raises(CacheError, match=r"crop\(n - cache.num_tokens\)"):
            cache.crop(5)
    with pytest.raises(CacheError, match="holds 12"):
        cache.crop(-13)
    cache.crop(0)
    assert same(content(cache), before)
    cache.crop(-4)
    assert cache.num_tokens == 8
    assert torch.equal(cache.tokens, prompt(12)[:, :8])
    again = run(model, cache, prompt(12)[:, 8:])
    whole = run(model, Cache(model.config), prompt(12))
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
    cache.crop(-cache.num_tokens)
    assert cache.num_tokens == 0
    assert cache.tokens.shape == (1, 0)


@pytest.mark.parametrize("name", ["mistral", "jamba", "mamba"])
def test_what_cannot_go_back_changes_nothing(models: dict[str, PreTrainedModel], name: str) -> None:
    """In jamba one layer could go back and the other cannot: neither does."""
    model = models[name]
    cache = Cache(model.config)
    run(model, cache, prompt(20))
    run(model, cache, prompt(1, seed=9))  # in 4.57 a window can take back its last append
    before = content(cache)
    assert not cache.can_crop(3)
    with pytest.raises(CacheError):
        cache.crop(-3)
    assert same(content(cache), before)
    with pytest.raises(UnsupportedVerb):
        cache.keep(torch.tensor([0, 1]))
    assert same(content(cache), before)


def test_keep(models: dict[str, PreTrainedModel]) -> None:
    model = models["llama"]
    cache = Cache(model.config)
    run(model, cache, prompt(12))
    before = content(cache)
    with pytest.raises(CacheError):
        cache.keep(torch.tensor([3, 12]))
    assert same(content(cache), before)
    cache.keep(torch.tensor([0, 1, 9, 10, 11]))
    assert (cache.num_tokens, cache.num_stored) == (12, 5)
    assert torch.equal(cache.tokens, prompt(12))
    run(model, cache, prompt(2, seed=3))
    assert (cache.num_tokens, cache.num_stored) == (14, 7)


def test_keep_refuses_to_uncover_padding(models: dict[str, PreTrainedModel]) -> None:
    cache = Cache(models["llama"].config)
    run(models["llama"], cache, prompt(12, batch=2))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    cache.record_tokens(prompt(12, batch=2), mask, 0)
    before = content(cache)
    # The mask tells columns 4.. apart from 0..: what is left of the padding would be seen.
    with pytest.raises(CacheError, match="padding"):
        cache.keep(torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]))
    with pytest.raises(CacheError, match="padding"):
        cache.keep(torch.tensor([2, 8, 9, 10, 11]).expand(2, 2, 5))
    assert same(content(cache), before)
    cache.keep(torch.tensor([3, 4, 5, 9, 10, 11]))
    cache.keep(torch.tensor([0, 3, 5]))
    assert cache.num_stored == 3


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_row_verbs(models: dict[str, PreTrainedModel], name: str, recipe: str) -> None:
    model = models[name]
    ids = prompt(9, batch=3)
    cache = Cache(model.config, recipe)
    run(model, cache, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.tokens, ids[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([-1, 0]))
    assert torch.equal(cache.tokens, ids[[0, 2]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.tokens, ids[[0, 0, 2, 2]])
    assert cache.batch_size == 4
    cache.select(torch.tensor([True, False, True, False]))
    before = content(cache)
    for bad in (torch.tensor([2]), torch.tensor([True]), torch.tensor([[0]])):
        with pytest.raises(CacheError):
            cache.select(bad)
        with pytest.raises(CacheError):
            cache.reorder(bad)
    with pytest.raises(CacheError):
        cache.repeat(0)
    assert same(content(cache), before)
    got = run(model, cache, prompt(1, batch=2, seed=5))  # Mamba takes one token at a time
    other = Cache(model.config)
    run(model, other, ids[[0, 2]])
    expected = run(model, other, prompt(1, batch=2, seed=5))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_log_of_one_row_follows_when_the_row_repeats_itself(
    models: dict[str, PreTrainedModel],
) -> None:
    model = models["llama"]
    cache = Cache(model.config)
    run(model, cache, prompt(6))
    with torch.no_grad():
        model(prompt(2, batch=3), past_key_values=cache)  # nobody names these
    assert cache.tokens.shape == (3, 8)
    assert cache.num_known_tokens == 6
    cache.reorder(torch.tensor([2, 1, 0]))
    cache.repeat(2)
    assert cache.tokens.shape == (6, 8)
    assert "2 of them unknown" in str(cache.report())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_merged_caches_generate_what_each_would_alone(
    models: dict[str, PreTrainedModel], name: str, recipe: str
) -> None:
    model = models[name]
    prompts = [prompt(n, seed=n) for n in (5, 13, 9)]
    caches, alone, last = [], [], []
    for ids in prompts:
        cache = Cache(model.config, recipe)
        run(model, cache, ids[:, :-1])
        caches.append(cache)
        last.append(ids[:, -1:])
        alone.append(greedy(model, cache.fork(), ids[:, -1:]))
    merged = Cache.merge(caches)
    assert merged.batch_size == 3
    assert merged.num_tokens == 12
    assert merged.attention_mask().sum(1).tolist() == [4, 12, 8]
    ids, together = torch.cat(last), []
    for _ in range(6):
        ids = run(model, merged, ids).argmax(-1, keepdim=True)
        together.append(ids)
    assert torch.cat(together, 1).tolist() == alone
    # And what was fed is what generate would have fed, with its own masks.
    batch = torch.full((3, 13), 0)
    for row, one in enumerate(prompts):
        batch[row, 13 - one.shape[1] :] = one
    mask = torch.cat([Cache.merge(caches).attention_mask(), torch.ones(3, 1, dtype=torch.int64)], 1)
    out = model.generate(
        batch, attention_mask=mask, past_key_values=Cache.merge(caches), max_new_tokens=6,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert out[:, 13:].tolist() == alone
    for row, cache in enumerate(caches):
        back = merged.extract(row)
        assert back.num_tokens == cache.num_tokens + 6
        assert torch.equal(back.tokens[:, : cache.num_tokens], cache.tokens)
        again = Cache(model.config)
        run(model, again, prompts[row])
        run(model, again, torch.tensor([alone[row][:-1]]))
        assert greedy(model, back, torch.tensor([alone[row][-1:]]), 4) == greedy(
            model, again, torch.tensor([alone[row][-1:]]), 4
        )


def test_merge_refusals(models: dict[str, PreTrainedModel]) -> None:
    filled = Cache(models["llama"].config)
    run(models["llama"], filled, prompt(4))
    static = Cache(models["llama"].config, "static(9)")
    other = Cache(models["jamba"].config)
    run(models["jamba"], other, prompt(4))
    for bad in ([], [filled, static], [filled, other], [filled, Cache(filled.config)]):
        with pytest.raises(CacheError):
            Cache.merge(bad)
    with pytest.raises(CacheError, match="Row 1"):
        filled.extract(1)


def test_caches_of_different_models_do_not_merge() -> None:
    twins, caches = [llama(seed=0), llama(seed=1)], []
    for model in twins:
        caches.append(Cache(model.config))
        prefill(model, prompt(6), caches[-1])
    with pytest.raises(CacheError, match="other weights"):
        Cache.merge(caches)
    assert Cache.merge([caches[0], caches[0].fork()]).filled_by is caches[0].filled_by


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_fork_goes_its_own_way(
    models: dict[str, PreTrainedModel], name: str, recipe: str
) -> None:
    model = models[name]
    cache = Cache(model.config, recipe)
    run(model, cache, prompt(10))
    fork, deep = cache.fork(), copy.deepcopy(cache)
    one, two = torch.tensor([[5]]), torch.tensor([[60]])
    expected = []
    for token in (one, two):
        fresh = Cache(model.config, recipe)
        run(model, fresh, prompt(10))
        expected.append(greedy(model, fresh, token))
    assert greedy(model, cache, one) == expected[0]
    assert greedy(model, fork, two) == expected[1]
    assert greedy(model, deep, one) == expected[0]
    assert fork.tokens[0, 10] == 60
    assert cache.tokens[0, 10] == 5
    cache.reset()
    assert fork.num_tokens == 16


# -- tokens and states -----------------------------------------------------------------------------


def test_common_prefix(models: dict[str, PreTrainedModel]) -> None:
    cache = Cache(models["llama"].config)
    ids = prompt(10)
    assert cache.common_prefix(ids) == 0
    run(models["llama"], cache, ids)
    assert cache.common_prefix(ids) == 10
    assert cache.common_prefix(torch.cat([ids, ids], 1)) == 10
    assert cache.common_prefix(ids[:, :4]) == 4
    other = ids.clone()
    other[0, 6] += 1
    assert cache.common_prefix(other) == 6
    assert cache.common_prefix(torch.cat([ids, other])) == 6  # one row serves a batch
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    assert cache.common_prefix(ids, mask) == 0
    cache.repeat(2)
    assert cache.common_prefix(ids) == 0  # two rows held, one asked for
    unknown = Cache(models["llama"].config)
    with torch.no_grad():
        models["llama"](ids, past_key_values=unknown)
    assert unknown.num_known_tokens == 0
    assert unknown.common_prefix(other) == 10  # nobody named them


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_state_round_trip(models: dict[str, PreTrainedModel], name: str, recipe: str) -> None:
    model = models[name]
    cache = Cache(model.config, recipe)
    run(model, cache, prompt(11))
    cache.content_key = "key"
    state = cache.to_state()
    json.dumps(state.meta)
    other = Cache.from_state(model.config, recipe, state)
    assert same(content(other), content(cache))
    assert other.content_key == "key"
    assert greedy(model, other, torch.tensor([[7]])) == greedy(model, cache, torch.tensor([[7]]))


def test_states_that_do_not_fit(models: dict[str, PreTrainedModel]) -> None:
    model = models["llama"]
    cache = Cache(model.config)
    run(model, cache, prompt(6))
    state = cache.to_state()
    shorter = Cache(model.config)
    run(model, shorter, prompt(4))
    mixed = (state.layers[0], shorter.to_state().layers[1])
    for bad in (
        CacheState(layers=state.layers[:1], tokens=state.tokens),
        CacheState(layers=state.layers, tokens=state.tokens[:, :3]),
        CacheState(layers=mixed, tokens=state.tokens),
        CacheState(layers=state.layers, cross=state.layers, tokens=state.tokens),
    ):
        with pytest.raises(CacheError):
            Cache.from_state(model.config, "", bad)
    with pytest.raises(CacheError, match="kind"):
        Cache.from_state(model.config, "static(9)", state)


def test_a_cache_is_not_pickled(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(CacheError, match="save"):
        pickle.dumps(Cache(models["llama"].config))


def test_report(models: dict[str, PreTrainedModel]) -> None:
    model = models["jamba"]
    cache = Cache(model.config)
    run(model, cache, prompt(7))
    report = cache.report()
    facts = report.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["nbytes"] == cache.nbytes == sum(row.nbytes for row in report.rows)
    assert facts["nbytes_reserved"] == cache.nbytes_reserved
    assert [row.kind for row in report.rows] == ["recurrent", "dense"]
    text = str(report)
    for word in ("jamba", "dense", "7 tokens seen", "float32", "total"):
        assert word in text
    assert "num_tokens=7" in repr(cache)


# -- encoder-decoder pairs -------------------------------------------------------------------------


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=96,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [bart, t5])
def test_pairs(make: Callable[[], PreTrainedModel], recipe: str) -> None:
    model = make()
    cache = Cache(model.config, recipe)
    assert isinstance(cache, transformers.EncoderDecoderCache)
    assert isinstance(cache, EncoderDecoderCache)
    source = prompt(7, batch=2)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(source, **options)
    assert torch.equal(model.generate(source, past_key_values=cache, **options), expected)
    assert cache.cross_attention_cache.layers[0].num_tokens == 7
    kinds = {row.kind for row in cache.report().rows}
    assert "cross" in kinds
    rows = content(cache)
    fork = cache.fork()
    assert isinstance(fork, EncoderDecoderCache)
    assert fork.is_updated == {0: True, 1: True}
    fork.select(torch.tensor([1]))
    assert fork.cross_attention_cache.layers[0].batch_size == 1
    fork.repeat(3)
    assert fork.cross_attention_cache.layers[1].batch_size == 3
    fork.reorder(torch.tensor([2, 1, 0]))
    fork.crop(-2)
    assert fork.num_tokens == cache.num_tokens - 2
    assert same(content(cache), rows)
    parts = [cache.extract(0), cache.extract(1)]
    assert same(content(Cache.merge(parts)), rows)
    again = Cache.from_state(model.config, recipe, cache.to_state())
    assert same(content(again), rows)
    assert again.is_updated == {0: True, 1: True}
    encoder = model.get_encoder()(source).last_hidden_state
    step = torch.tensor([[5], [6]])
    logits = [
        model(
            decoder_input_ids=step, encoder_outputs=(encoder,), past_key_values=one, use_cache=True
        ).logits
        for one in (cache, again)
    ]
    assert torch.equal(*logits)
    with pytest.raises(CacheError):
        Cache.merge([parts[0], Cache(model.config, recipe)])
    cache.reset()
    assert cache.is_updated == {0: False, 1: False}
    assert torch.equal(model.generate(source, past_key_values=cache, **options), expected)


# -- configs ---------------------------------------------------------------------------------------


def test_multimodal_configs_use_their_text_part() -> None:
    model = llava()
    cache = Cache(model.config)
    assert len(cache.layers) == model.config.text_config.num_hidden_layers
    with torch.no_grad():
        model(prompt(5), past_key_values=cache)
    assert cache.num_tokens == 5
    gemma = Gemma3Config(text_config={"num_hidden_layers": 7, "sliding_window": 16})
    cache = Cache(gemma)
    assert cache.is_sliding == [True] * 5 + [False, True]
    assert [layer.max_length for layer in cache.layers] == [16] * 5 + [-1, 16]


def test_generate_takes_it_for_its_own(models: dict[str, PreTrainedModel]) -> None:
    model = models["llama"]
    ids = prompt(9)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=DynamicCache(), **options)
    cache = Cache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert isinstance(cache, transformers.Cache)


@pytest.mark.parametrize("config", [None, "llama", {"model_type": "llama"}, 7])
def test_wrong_configs(config: object) -> None:
    with pytest.raises(ModelError, match="config"):
        Cache(config)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [LlamaConfig(), BartConfig()])
def test_wrong_recipes(config: PreTrainedConfig) -> None:
    for recipe in ("sinks(4)", "nothing", "static", "static(0)", "disk(1)", 3):
        with pytest.raises(RecipeError):
            Cache(config, recipe)  # type: ignore[arg-type]


def test_early_initialization(models: dict[str, PreTrainedModel]) -> None:
    model = models["llama"]
    for recipe in RECIPES:
        cache = Cache(model.config, recipe)
        cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
        assert cache.is_initialized
        assert (cache.num_tokens, cache.batch_size) == (0, 2)
        run(model, cache, prompt(4, batch=2))
        assert cache.num_tokens == 4
        with pytest.raises(CacheError):
            cache.early_initialization(2, [2], [8], torch.float32, torch.device("cpu"))
