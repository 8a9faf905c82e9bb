"""What old modeling files rely on beside the cache, and what becomes of it."""

import pytest
from migrating import migrate, migrated, undecided

HEAD = """import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.masking_utils import create_causal_mask


"""
ROTARY = """class Rotary(nn.Module):
    def __init__(self, dim, base=10000, *, scale=1.0, **kwargs):
        super().__init__()  # first
        self.register_buffer("inv_freq", base ** torch.arange(dim) * scale, persistent=False)
        self.original_inv_freq = self.inv_freq


"""
MODEL = """class Base(PreTrainedModel):
    base_model_prefix = "model"


class Model(Base):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(8, 8)
        self.lm_head = nn.Linear(8, 8)
"""


def test_buffers_that_are_not_saved_are_made_again() -> None:
    after = migrated(HEAD + ROTARY + MODEL)
    note = "self._init_arguments = dict(dim=dim, base=base, scale=scale, **kwargs)"
    assert f"super().__init__()  # first\n        {note}\n" in after
    assert after.count("def _restore_buffers(module):") == 1
    assert after.count("def _init_weights(self, module):") == 1
    assert not undecided(after)
    assert migrated(HEAD + ROTARY + MODEL, "4.57") == HEAD + ROTARY + MODEL


def test_they_hold_what_they_held_once_loaded() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    scope: dict[str, object] = {}
    exec(compile(migrated(HEAD + ROTARY + MODEL), "modeling", "exec"), scope)
    rotary = scope["Rotary"](4, base=2, scale=0.5)  # type: ignore[operator]
    wanted = rotary.inv_freq.clone()
    with torch.device("meta"):
        rotary = scope["Rotary"](4, base=2, scale=0.5)  # type: ignore[operator]
    rotary.inv_freq = torch.empty_like(rotary.inv_freq, device="cpu")  # as loading does
    before = torch.get_rng_state()
    assert scope["_restore_buffers"](rotary) is True  # type: ignore[operator]
    assert torch.equal(rotary.inv_freq, wanted)
    assert torch.equal(rotary.original_inv_freq, wanted)
    assert torch.equal(torch.get_rng_state(), before)
    assert scope["_restore_buffers"](torch.nn.Linear(1, 1)) is False  # type: ignore[operator]


def test_an_init_weights_of_the_file_asks_first() -> None:
    own = '\n    def _init_weights(self, block):\n        """Doc."""\n        block.x = 1\n'
    after = migrated(HEAD + ROTARY + MODEL.replace('"model"\n', f'"model"\n{own}', 1))
    assert '"""Doc."""\n        if _restore_buffers(block):\n            return\n' in after


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("(self, dim, base=10000, *, scale=1.0, **kwargs)", "(self, *args)", "any arguments"),
        ("        super().__init__()  # first\n", "", "not plain"),
        ("        super()", "        base = 2\n        super()", "`base` changes"),
        ("        super()", "        kwargs.pop(1)\n        super()", "`kwargs` changes"),
        ("# first\n        self.reg", "; self.reg", "no line of its own"),
        ("class Rotary(nn.Module)", "class Rotary(PreTrainedModel)", "whole model"),
    ],
)
def test_what_a_module_was_made_with_may_not_be_plain(old: str, new: str, reason: str) -> None:
    source = HEAD + ROTARY.replace(old, new, 1) + MODEL
    assert source != HEAD + ROTARY + MODEL
    found = [f for f in migrate(source).findings if f.rule == "non_persistent_buffer"]
    assert [f.status for f in found] == ["undecided"]
    assert reason in found[0].message
    assert "_restore_buffers" not in migrated(source)


def test_a_file_without_models_is_only_told_of_its_buffers() -> None:
    old = "\ndef f(past_key_values):\n    return past_key_values.seen_tokens\n"
    modern = HEAD + ROTARY + MODEL.replace('["lm_head.weight"]', '{"a.weight": "b.weight"}')
    assert migrated(modern) == modern
    assert [rule for rule, _ in undecided(modern)] == ["non_persistent_buffer"]
    assert "_restore_buffers" in migrated(modern + old)


def test_the_default_of_the_table_is_the_files_own() -> None:
    use = "class R(nn.Module):\n    def f(self, kind):\n        return ROPE_INIT_FUNCTIONS[kind]\n"
    after = migrated(HEAD + use)
    assert '{"default": _default_rope_parameters, **ROPE_INIT_FUNCTIONS}[kind]' in after
    assert after.index("def _default_rope_parameters(") < after.index("class R(")
    assert migrated(HEAD + use, "4.57") == HEAD + use
    other = use.replace("[kind]", '["yarn"]')
    assert migrated(HEAD + other) == HEAD + other
    guarded = use.replace("return", 'if kind != "default": return')
    assert migrated(HEAD + guarded) == HEAD + guarded
    own = HEAD.replace("transformers.modeling_rope_utils", "mine") + use
    assert migrated(own) == own
    assert undecided(f"{HEAD}{use}ROPE_INIT_FUNCTIONS = {{}}\n") == [("rope_default", 10)]


def test_masks_take_no_positions() -> None:
    call = "m = create_causal_mask(config=c, input_embeds=x, cache_position=p, past_key_values=k)\n"
    after = "m = create_causal_mask(config=c, inputs_embeds=x, past_key_values=k)\n"
    assert migrated(HEAD + call) == HEAD + after
    assert migrated(HEAD + call, "5.0") == HEAD + call
    last = "m = create_causal_mask(c, x, a, past_key_values=k, cache_position=p)\n"
    assert migrated(HEAD + last) == HEAD + last.replace(", cache_position=p", "")
    handed = (
        "def f(c, x, p, sliding):\n"
        "    words = {\n"
        '        "config": c,\n'
        '        "input_embeds": x,\n'
        '        "cache_position": p,\n'
        "    }\n"
        "    return create_causal_mask(**words)\n"
    )
    wanted = handed.replace('"input_e', '"inputs_e').replace('        "cache_position": p,\n', "")
    assert migrated(HEAD + handed) == HEAD + wanted
    elsewhere = handed.replace("    return", "    g(words)\n    return")
    assert migrated(HEAD + elsewhere) == HEAD + elsewhere
    assert undecided(HEAD + elsewhere) == [("mask_arguments", 15)]


def test_defaults_that_left_the_base_classes() -> None:
    body = (
        "        if config.add_cross_attention: pass\n"
        "        self.config.is_decoder = True\n\n"
        "    def forward(self, head_mask):\n"
        "        return self.get_head_mask(head_mask, self.config.n_layer)\n"
    )
    after = migrated(HEAD + MODEL + body)
    assert 'if getattr(config, "add_cross_attention", False): pass' in after
    assert "self.config.is_decoder = True" in after
    assert "return _get_head_mask(self, head_mask, self.config.n_layer)" in after
    assert 'if not hasattr(config, "tie_word_embeddings"):' in after


def test_positions_that_generate_passes_are_not_thrown_away() -> None:
    body = """
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        position_ids = kwargs.get("position_ids", None)
        mask = kwargs.get("attention_mask")
        if mask is not None and position_ids is None:
            position_ids = mask.cumsum(-1) - 1
        else:
            position_ids = None
        return {"input_ids": input_ids, "position_ids": position_ids}
"""
    after = migrated(HEAD + MODEL + body)
    assert "position_ids = None" not in after
    assert "position_ids = position_ids[..., -input_ids.shape[1] :]" in after
    assert "            position_ids = mask.cumsum(-1) - 1\n        return" in after
