"""Tiny models with mnemon's attention against the same models without it."""

from types import ModuleType

import pytest
import torch
from tiny import SERVED, build, inputs, logits_of
from transformers import AttentionInterface, DynamicCache, StaticCache

from mnemon.attention import cpu
from mnemon.cache import Cache
from mnemon.hf import attention as hf_attention
from mnemon.hf import attention_functions
from mnemon.hf.attention import attention_forward, enable
from mnemon.hf.masks import ATTENTION_NAME, EAGER_NAME
from releases import since


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of mnemon's functions did the work, in order."""
    seen: list[str] = []

    def spy(owner: ModuleType, name: str):
        function = getattr(owner, name)

        def spied(*args, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)

    for name in ("fused_attention", "spread_attention", "attend"):
        spy(attention_functions, name)
    spy(cpu, "decode")
    return seen


@pytest.mark.parametrize("left_padding", [0, 6])
@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_the_model(name: str, left_padding: int, calls: list[str]) -> None:
    model = build(name)
    prompt = inputs(left_padding)
    expected = logits_of(model, prompt)
    with enable(model) as restore:
        assert restore.served
        assert not restore.left_alone
        got = logits_of(model, prompt)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.std() > 0.1, "logits that hardly vary would agree by accident"
    if name != "t5":  # a position bias is left to transformers' own function
        assert len(calls) >= 7 * 2, "decoding did not go through mnemon's attention"
    calls.clear()
    assert torch.equal(logits_of(model, prompt), expected)
    assert not calls


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bart"])
def test_bfloat16_stays_close(name: str) -> None:
    model = build(name).to(torch.bfloat16)
    prompt = inputs()
    expected = logits_of(model, prompt, num_steps=1).float()
    with enable(model):
        got = logits_of(model, prompt, num_steps=1).float()
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 0.05


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_static_cache_hands_out_its_whole_buffer(name: str) -> None:
    model = build(name)
    prompt = inputs()
    expected = logits_of(model, prompt)
    with enable(model):
        for mask in (prompt["attention_mask"], None):
            ids = prompt["input_ids"]
            cache = StaticCache(config=model.config, max_cache_len=40)
            reference = DynamicCache(config=model.config)
            with torch.no_grad():
                got = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
                want = model(input_ids=ids, attention_mask=mask, past_key_values=reference).logits
            torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
        got = logits_of(model, prompt, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gemma3"])
def test_a_prompt_in_parts_sees_what_lies_before(name: str, calls: list[str]) -> None:
    """Several query rows on a past: causal to the lower right, whatever the number of rows."""
    model = build(name)
    ids = inputs(0, length=130)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with enable(model):
            cache = DynamicCache(config=model.config)
            parts = [
                model(input_ids=part, past_key_values=cache).logits
                for part in ids.split([40, 3, 20, 1, 26, 40], dim=1)
            ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    if name == "llama":
        few = "decode" if cpu.is_built() else "fused_attention"
        assert {few, "spread_attention"} <= set(calls)


def test_left_padding_is_ignored_without_a_mask_function_and_honoured_with_ours() -> None:
    """transformers makes no mask at all for a name that has no mask function."""
    model = build("llama")
    prompt = inputs(left_padding=6)
    expected = logits_of(model, prompt)
    unpadded = {key: value[:1, 6:] for key, value in prompt.items()}
    torch.testing.assert_close(expected[:, :1], logits_of(model, unpadded), rtol=1e-3, atol=1e-3)

    AttentionInterface.register("attention_without_masks", attention_forward)
    try:
        model.set_attn_implementation("attention_without_masks")
        wrong = logits_of(model, prompt)
    finally:
        del AttentionInterface._global_mapping["attention_without_masks"]
    assert (wrong[:, 0] - expected[:, 0]).abs().max() > 0.1, "padding was seen as text"
    torch.testing.assert_close(wrong[:, 1], expected[:, 1], rtol=1e-4, atol=1e-4)

    hf_attention.register()
    for name in (ATTENTION_NAME, EAGER_NAME):
        model.set_attn_implementation(name)
        got = logits_of(model, prompt)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# 4.57 warns that "sdpa" cannot give them; mnemon's function does.
@pytest.mark.filterwarnings("ignore:.output_attentions=True. is not supported:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5", "bart"])
def test_attention_weights_are_given_when_asked_for(name: str) -> None:
    model = build(name, _attn_implementation="eager")
    prompt = inputs()
    options = {"output_attentions": True}
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = prompt["input_ids"][:, :5]
    field = "decoder_attentions" if model.config.is_encoder_decoder else "attentions"
    with torch.no_grad():
        expected = model(**prompt, **options)[field]
        with enable(model):
            got = model(**prompt, **options)[field]
        model.set_attn_implementation("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
        with enable(model):
            from_sdpa = model(**prompt, **options)[field]
    for ours, sdpa, theirs in zip(got, from_sdpa, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        # A padded row sees nothing: what its weights are is for each function to say.
        torch.testing.assert_close(sdpa[1], theirs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bart"])
def test_training_gives_the_same_gradients(name: str) -> None:
    model = build(name, attention_dropout=0.25)
    prompt = inputs()

    def gradients(train: bool) -> dict[str, torch.Tensor]:
        model.train(train)
        model.zero_grad()
        torch.manual_seed(5)
        model(**prompt, labels=prompt["input_ids"]).loss.backward()
        return {
            key: value.grad.clone()
            for key, value in model.named_parameters()
            if value.grad is not None
        }

    for train in (False, True):  # with dropout in the second round
        expected = gradients(train)
        with enable(model):
            got = gradients(train)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4, msg=key)


@since(5, 14)  # the masks of 4.57 do not trace under a current torch
@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt_oss"))],
)
def test_compiles_in_one_graph(name: str) -> None:
    model = build(name)
    ids = inputs(0)["input_ids"]
    with torch.no_grad(), enable(model):
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "bart"])
def test_with_mnemons_cache(name: str) -> None:
    """Keys come strided, from a buffer with reserve; tokens and logits stay what they were."""
    model = build(name)
    prompt = inputs()
    expected = logits_of(model, prompt, num_steps=20)
    with enable(model):
        got = logits_of(model, prompt, num_steps=20, past_key_values=Cache(model.config))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class OneLayer(torch.nn.Module):
    """A module that does nothing but attend."""

    is_causal = True
    num_key_value_groups = 2

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return attention_forward(self, query, keys, keys, None)[0]


@pytest.mark.parametrize("num_new", [1, 7])
def test_exports(num_new: int) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, 4, num_new, 8, generator=generator)
    keys = torch.randn(1, 2, 7, 8, generator=generator)
    exported = torch.export.export(OneLayer(), (query, keys)).module()
    torch.testing.assert_close(exported(query, keys), OneLayer()(query, keys))
