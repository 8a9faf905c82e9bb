"""What a person must decide: reported with its line, and left as it is."""

import pytest
from migrating import HEADER, migrate, undecided

from mnemon.migrate import Status

CASES = [
    ("def f(cache: Cache):\n    cache.seen_tokens = 3", "seen_tokens"),
    ("def f(cache: Cache):\n    cache._seen_tokens += 3", "_seen_tokens"),
    ("def f(cache: Cache):\n    cache.key_cache = []", "key_cache"),
    ("def f(cache: Cache):\n    cache.key_cache.pop()", "key_cache"),
    ("def f(cache: Cache):\n    return cache.key_cache", "key_cache"),
    ("def f(cache: Cache):\n    del cache.key_cache[0]", "key_cache"),
    ("def f(cache: StaticCache):\n    return cache.get_usable_length(1, 0)", "get_usable_length"),
    ("def f(cache: Cache):\n    g = cache.get_usable_length", "get_usable_length"),
    ("def f(cache: Cache):\n    cache.crop(g(n))", "positive_crop"),
    ("def f(cache: Cache, n):\n    cache.crop(n)", "positive_crop"),
    ("def f(c: Cache):\n    return c if 1 else c.get_max_length()", "get_max_length"),
    ("def f(past_cache):\n    return past_cache.seen_tokens", "seen_tokens"),
    ("def f(x):\n    return x.get_usable_length(1, 0)", "get_usable_length"),
    ("DynamicCache.seen_tokens = property(g)", "seen_tokens"),
    ("setattr(DynamicCache, 'get_usable_length', g)", "get_usable_length"),
    (
        "class C(DynamicCache):\n    def get_usable_length(self, n, i=0): return n",
        "get_usable_length",
    ),
    ("def f(cache: Cache):\n    setattr(cache, 'key_cache', [])", "key_cache"),
    ("def f(cache: Cache):\n    if hasattr(cache, 'key_cache'): print(1)", "key_cache"),
    ("from transformers import SinkCache\nc = SinkCache(8, 2)", "SinkCache"),
    ("from transformers import HybridCache\nclass C(HybridCache): pass", "HybridCache"),
    ("from transformers import HybridCache\nc = HybridCache(*a)", "HybridCache"),
    ("s = StaticCache(*a, device=1)", "static_cache_arguments"),
    ("def f(past_key_values):\n    return past_key_values[0][0].shape[2]", "cache[i]"),
    ("def f(c: DynamicCache):\n    return list(c)", "iteration"),
    ("model.generate(ids, past_key_values=((k, v),))", "tuple_to_generate"),
]


@pytest.mark.parametrize(("source", "rule"), CASES)
def test_it_is_reported_and_left(source: str, rule: str) -> None:
    whole = f"{HEADER}{source}\n"
    found = migrate(whole)
    assert not found.changed
    assert [f.rule for f in found.of(Status.UNDECIDED)] == [rule]
    for finding in found.findings:
        assert finding.message
        assert finding.place.line > 1


def test_a_cache_that_fills_its_lists_itself_is_left_whole() -> None:
    body = (
        "class C(DynamicCache):\n"
        "    def update(self, k, v, i, kwargs=None):\n"
        "        if len(self.key_cache) <= i:\n"
        "            self.key_cache.append(k)\n"
        "        else:\n"
        "            self.key_cache[i] = g(self.key_cache[i], k)\n"
        "        return self.key_cache[i], v\n"
    )
    found = migrate(HEADER + body)
    assert not found.changed
    assert {f.rule for f in found.of(Status.UNDECIDED)} == {"key_cache"}
    # One that leaves the filling to its base class moves.
    assert migrate(HEADER + body.replace("self.key_cache.append(k)", "pass")).changed


def test_the_place_is_exact() -> None:
    source = f"{HEADER}\ndef f(cache: Cache):\n\tä = 'é'; cache.seen_tokens = 3\n"
    place = migrate(source).findings[0].place
    line = source.splitlines()[place.line - 1]
    assert line[place.column - 1 : place.end_column - 1] == "cache.seen_tokens"


def test_a_line_can_be_kept() -> None:
    source = f"{HEADER}def f(c: Cache):\n    return c.seen_tokens  # mnemon: keep\n"
    assert not migrate(source).findings


def test_an_attribute_that_the_file_patches_in_works_as_it_is() -> None:
    source = f"{HEADER}DynamicCache.seen_tokens = property(g)\nprint(DynamicCache().seen_tokens)\n"
    assert undecided(source) == [("seen_tokens", 2)]


def test_an_undecided_class_keeps_its_import() -> None:
    source = "from transformers import HybridCache\nx = HybridCache(c, 1, 2)\ny = HybridCache\n"
    after = migrate(source).after.decode()
    assert after.startswith("from transformers import HybridCache, StaticCache\n")
    assert "x = StaticCache(c, max_cache_len=2)" in after
