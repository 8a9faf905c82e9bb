"""Each rule on snippets: before, after, for the targets that lack the name."""

import pytest
from migrating import HEADER, TARGETS, body, migrated

PAIRS = [
    ("x = cache.seen_tokens", "x = cache.get_seq_length()", TARGETS),
    ("x = cache._seen_tokens  # why", "x = cache.get_seq_length()  # why", TARGETS),
    ('x = getattr(cache, "seen_tokens", 0)', "x = cache.get_seq_length()", TARGETS),
    ("x = cache.get_usable_length(n, i)", "x = cache.get_seq_length(i)", TARGETS),
    ("x = cache.get_usable_length(n)", "x = cache.get_seq_length()", TARGETS),
    (
        "x = cache.get_usable_length(new_seq_length=n, layer_idx=i)",
        "x = cache.get_seq_length(layer_idx=i)",
        TARGETS,
    ),
    ("x = cache.key_cache[ i ]  # a", "x = cache.layers[ i ].keys  # a", TARGETS),
    ("cache.value_cache[i] = v", "cache.layers[i].values = v", TARGETS),
    ("cache.key_cache[i] += k", "cache.layers[i].keys += k", TARGETS),
    ("x = cache.key_cache[:n]", "x = [layer.keys for layer in cache.layers[:n]]", TARGETS),
    (
        "for i in range(len(cache.key_cache)): pass",
        "for i in range(len(cache.layers)): pass",
        TARGETS,
    ),
    ("if not cache.key_cache: pass", "if not cache.get_seq_length(): pass", TARGETS),
    (
        "for k, v in zip(cache.key_cache, cache.value_cache): pass",
        "for k, v in ((layer.keys, layer.values) for layer in cache.layers): pass",
        TARGETS,
    ),
    (
        "for x in cache.key_cache: pass",
        "for x in [layer.keys for layer in cache.layers]: pass",
        TARGETS,
    ),
    (
        "layer = max(cache.key_cache[0], layer)",
        "layer = max(cache.layers[0].keys, layer)",
        TARGETS,
    ),
    ("x = cache[0][0].shape[2]", "x = cache.get_seq_length()", ("5.0", "5.23")),
    ("x = cache[i][1].size(-2)", "x = cache.get_seq_length(i)", ("5.0", "5.23")),
    ("x = cache[i][1]", "x = cache.layers[i].values", ("5.0", "5.23")),
    ("k, v = cache[i]", "k, v = cache.layers[i].keys, cache.layers[i].values", ("5.0", "5.23")),
    ("print(cache[i])", "print((cache.layers[i].keys, cache.layers[i].values))", ("5.0", "5.23")),
    (
        "for k, v in cache: pass",
        "for k, v in ((layer.keys, layer.values) for layer in cache.layers): pass",
        ("5.0", "5.23"),
    ),
    (
        "for i, (k, v) in enumerate(cache): pass",
        "for i, (k, v) in enumerate((layer.keys, layer.values) for layer in cache.layers): pass",
        ("5.0", "5.23"),
    ),
    (
        "return cache.to_legacy_cache()",
        "return tuple((layer.keys, layer.values) for layer in cache.layers)",
        ("5.0", "5.23"),
    ),
    ("c = DynamicCache.from_legacy_cache(v)", "c = DynamicCache(v)", ("5.0", "5.23")),
    ("c = DynamicCache.from_legacy_cache(None)", "c = DynamicCache()", ("5.0", "5.23")),
    (
        "c = DynamicCache.from_legacy_cache(past_key_values=v)",
        "c = DynamicCache(v)",
        ("5.0", "5.23"),
    ),
    ("k, v = cache.update(k, v, i, {'sin': n})", "k, v = cache.update(k, v, i)", ("5.23",)),
    ("k, v = cache.update(k, v, i, cache_kwargs=n)", "k, v = cache.update(k, v, i)", ("5.23",)),
    (
        "x = cache.get_mask_sizes(cache_position, 0)",
        "x = cache.get_mask_sizes(cache_position.shape[0], 0)",
        ("5.23",),
    ),
    ("cache.crop(5)", "cache.crop(min(5 - cache.get_seq_length(), 0))", ("5.23",)),
    (
        "cache.crop(max_length)",
        "cache.crop(min(max_length - cache.get_seq_length(), 0))",
        ("5.23",),
    ),
    ("cache.crop(cache.get_seq_length() - n)", "cache.crop(-n)", ("5.23",)),
    (
        "s = StaticCache(config=n, max_batch_size=1, max_cache_len=8, device=k, dtype=v)",
        "s = StaticCache(config=n, max_cache_len=8)",
        TARGETS,
    ),
    ("s = StaticCache(n, 1, 128, v, k)", "s = StaticCache(n, max_cache_len=128)", TARGETS),
    ("c = DynamicCache(num_hidden_layers=n)", "c = DynamicCache()", TARGETS),
    ('print(f"{cache.seen_tokens:>5} {n}")', 'print(f"{cache.get_seq_length():>5} {n}")', TARGETS),
]


@pytest.mark.parametrize(("before", "after", "targets"), PAIRS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_rule(before: str, after: str, targets: tuple[str, ...], target: str) -> None:
    assert body(before, target) == (after if target in targets else before)


@pytest.mark.parametrize(
    ("target", "name", "filled"),
    [
        ("4.57", "get_max_cache_shape", ""),
        ("5.0", "get_max_cache_shape", ""),
        ("5.23", "get_max_length", "len(cache) and "),
    ],
)
def test_none_stays_none_for_a_cache_without_a_bound(target: str, name: str, filled: str) -> None:
    asked = f"cache.{name}()"
    after = body("x = cache.get_max_length()\nif x is not None: pass", target)
    assert after.splitlines()[0] == f"x = {asked} if {filled}{asked} >= 0 else None"


def test_what_is_compared_with_a_number_is_modern() -> None:
    before = "x = cache.get_max_length()\nif x == -1: pass"
    assert body(before) == before
    before = "x = cache.get_max_cache_shape()\nif x < 0: pass"
    assert body(before).splitlines()[0] == "x = cache.get_max_length(0)"


def test_a_bound_is_a_number_in_every_release() -> None:
    before = "if isinstance(cache, StaticCache):\n    x = cache.get_max_length()"
    assert body(before) == before
    assert "get_max_cache_shape()" in body(before, "4.57")


CLASSES = [
    ("HybridCache(config, 2, 64, device=d, dtype=t)", "StaticCache(config, max_cache_len=64)"),
    ("SlidingWindowCache(config=c, max_cache_len=9)", "StaticCache(config=c, max_cache_len=9)"),
    (
        "OffloadedStaticCache(config=c, max_batch_size=1, max_cache_len=9)",
        "StaticCache(config=c, max_cache_len=9, offloading=True)",
    ),
    ("OffloadedCache()", "DynamicCache(offloading=True)"),
    ("QuantoQuantizedCache(c, nbits=2)", 'QuantizedCache("quanto", c, nbits=2)'),
    ("HQQQuantizedCache(config=c)", 'QuantizedCache("hqq", config=c)'),
    ("HybridChunkedCache(c, max_cache_len=9)", "StaticCache(c, max_cache_len=9)"),
]


@pytest.mark.parametrize(("before", "after"), CLASSES)
@pytest.mark.parametrize("target", ["5.0", "5.23"])
def test_a_class_and_its_import(before: str, after: str, target: str) -> None:
    old, new = before.split("(")[0], after.split("(")[0]
    source = f"from transformers import {old}\nx = {before}\n"
    assert migrated(source, target) == f"from transformers import {new}\nx = {after}\n"
    source = f"import transformers as tf\nx = tf.{before}\n"
    assert migrated(source, target) == f"import transformers as tf\nx = tf.{after}\n"
    source = f"from transformers import {old}\nx = {before}\n"
    assert migrated(source, "4.57") == source  # still there, with a warning


def test_isinstance_asks_for_what_the_class_was() -> None:
    source = "from transformers import HybridCache\nx = 1 if isinstance(c, HybridCache) else 2\n"
    assert migrated(source) == (
        "from transformers import StaticCache\n"
        "x = 1 if (isinstance(c, StaticCache) and any(c.is_sliding)) else 2\n"
    )
    source = (
        "from transformers import HybridCache, StaticCache\n"
        "isinstance(c, (StaticCache, HybridCache))\n"
    )
    assert migrated(source) == "from transformers import StaticCache\nisinstance(c, StaticCache)\n"


def test_annotations_and_long_imports_keep_their_shape() -> None:
    source = (
        "from __future__ import annotations\n"
        "from transformers.cache_utils import (\n"
        "    Cache,  # one\n"
        "    HybridCache,  # two\n"
        "    StaticCache,\n"
        ")\n"
        "def f(c: HybridCache | None) -> Cache: return c\n"
    )
    assert migrated(source) == (
        "from __future__ import annotations\n"
        "from transformers.cache_utils import (\n"
        "    Cache,  # one\n"
        "    StaticCache,\n"
        ")\n"
        "def f(c: StaticCache | None) -> Cache: return c\n"
    )


def test_the_fx_helper_goes_with_its_import() -> None:
    source = (
        "from transformers.utils.import_utils import is_torch_fx_available\n"
        "if is_torch_fx_available():\n    import torch.fx\n"
    )
    assert migrated(source) == "if True:\n    import torch.fx\n"


def test_two_lists_that_grow_together() -> None:
    before = "if n:\n    cache.key_cache.append(k)\n    cache.value_cache.append(v)"
    assert body(before) == (
        "if n:\n    cache.update(k, v, sum(layer.is_initialized for layer in cache.layers))"
    )
    before = "cache.key_cache = [t[i] for t in cache.key_cache]"
    assert body(before) == "for layer in cache.layers:\n    layer.keys = layer.keys[i]"


def test_edits_inside_edits() -> None:
    assert body("x = cache.get_usable_length(n, cache.seen_tokens)") == (
        "x = cache.get_seq_length(cache.get_seq_length())"
    )
    assert body("x = cache.key_cache[cache.seen_tokens]") == (
        "x = cache.layers[cache.get_seq_length()].keys"
    )


def test_comments_inside_a_rewritten_expression_stay() -> None:
    before = "x = cache.key_cache[\n    i  # this layer\n]"
    assert body(before) == "x = cache.layers[\n    i  # this layer\n].keys"


RECEIVERS = [
    "c = DynamicCache()",
    "from transformers import DynamicCache as DC\nc = DC()",
    "import transformers\nc = transformers.DynamicCache()",
    "import transformers.cache_utils as cu\nc = cu.StaticCache(config=1, max_cache_len=2)",
    "c: 'DynamicCache | None' = None",
    "if (c := DynamicCache()) is not None: pass",
    "c, other = DynamicCache(), 1",
    "import copy\nc = copy.deepcopy(DynamicCache())",
    "def make():\n    return DynamicCache()\nc = make()",
    "def make() -> Cache: ...\nc = make()",
    "class Mine(DynamicCache): pass\nc = Mine()",
    "assert isinstance(c, Cache)",
    "out = model(ids)\nc = out.past_key_values",
    "from typing import cast\nc = cast(Cache, x)",
    "c = a if b else DynamicCache()\nif not isinstance(c, Cache): raise TypeError",
    "caches = [DynamicCache()]\nc = caches[0]",
    "c = EncoderDecoderCache(DynamicCache(), DynamicCache()).self_attention_cache",
]


@pytest.mark.parametrize("setup", RECEIVERS)
def test_a_receiver_is_known(setup: str) -> None:
    head = HEADER.replace("Cache,", "Cache, EncoderDecoderCache,", 1)
    source = f"{head}{setup}\nprint(c.seen_tokens)\n"
    assert migrated(source).endswith("print(c.get_seq_length())\n")


NOT_RECEIVERS = [
    "c = DynamicCache()\nc = Counter()",
    "c = DynamicCache()\nfor c in counters: pass",
    "c = DynamicCache()\ndel c",
    "c = DynamicCache()\nwith counter() as c: pass",
    "c = DynamicCache()\nc: int = 3",
    "c = 3 if x else DynamicCache()",
    "class DynamicCache: pass\nc = DynamicCache()",
    "DynamicCache = Counter\nc = DynamicCache()",
]


@pytest.mark.parametrize("setup", NOT_RECEIVERS)
def test_a_receiver_is_not_known(setup: str) -> None:
    source = f"{HEADER}{setup}\nprint(c.seen_tokens)\n"
    assert migrated(source) == source


def test_closures_and_attributes() -> None:
    source = (
        f"{HEADER}class Runner:\n"
        "    def __init__(self):\n        self.cache = DynamicCache()\n"
        "    def length(self):\n        def inner():\n            return self.cache.seen_tokens\n"
        "        return inner()\n"
        "    def other(self, cache=None):\n        return [c.seen_tokens for c in [cache]]\n"
    )
    after = migrated(source)
    assert "return self.cache.get_seq_length()" in after
    assert "c.seen_tokens for c" in after


def test_call_sites_tell_what_a_parameter_is() -> None:
    source = f"{HEADER}def f(c):\n    return c.seen_tokens\nf(DynamicCache())\n"
    assert "c.get_seq_length()" in migrated(source)
    source += "f(3)\n"
    assert "c.seen_tokens" in migrated(source)


def test_what_only_old_code_means_is_rewritten_in_old_code() -> None:
    before = "x = cache.seen_tokens\n"
    assert body(f"{before}cache.crop(0)").splitlines()[1] == "cache.reset()"
    assert body("cache.crop(0)") == "cache.crop(0)"
    assert body(f"{before}cache.crop(n)").splitlines()[1] == (
        "cache.crop(min(n - cache.get_seq_length(), 0) if n >= 0 else n)"
    )
    assert "for entry" not in body(f"{before}x = list(cache)")
    assert body(f"{before}x = list(cache)").splitlines()[1] == (
        "x = list((layer.keys, layer.values) for layer in cache.layers)"
    )


def test_a_model_of_the_tuple_days_gets_a_door() -> None:
    source = (
        "import torch\nfrom transformers import PreTrainedModel\n"
        "class M(PreTrainedModel):\n"
        "    def forward(self, ids, past_key_values=None):\n"
        "        n = past_key_values[0][0].shape[2]\n"
    )
    after = migrated(source)
    assert "from transformers.cache_utils import Cache\n" in after
    assert "        if isinstance(past_key_values, Cache):\n" in after
    assert after.endswith("        n = past_key_values[0][0].shape[2]\n")
    assert migrated(source, "4.57") == source


def test_what_else_keeps_old_models_from_running() -> None:
    source = (
        "import torch\nfrom transformers import PreTrainedModel\n"
        "class M(PreTrainedModel):\n"
        '    _tied_weights_keys = ["lm_head.weight"]\n'
        "    def __init__(self, config):\n"
        "        self.embed = torch.nn.Embedding(4, 4)\n"
        "        if config.rope_scaling is not None:\n"
        "            pass\n"
        "    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):\n"
        "        position_ids = kwargs.get('position_ids', None)\n"
        "        return position_ids\n"
    )
    after = migrated(source)
    assert '    _tied_weights_keys = {"lm_head.weight": "embed.weight"}\n' in after
    assert '(config.rope_scaling or {}).get("rope_type", "default") != "default"' in after
    assert "            position_ids = position_ids[..., -input_ids.shape[1] :]\n" in after
    assert migrated(source, "4.57") == source
