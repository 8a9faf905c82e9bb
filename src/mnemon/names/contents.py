"""Names that reach the keys and values, and their old form as a tuple of tuples."""

from mnemon.names.model import Kind, Message, Name

__all__ = ["CONTENTS"]

CONTENTS = (
    Name(
        key="key_cache",
        spelling="cache.key_cache[i]",
        kind=Kind.ATTRIBUTE,
        owner="DynamicCache, StaticCache and others; Cache in 4.54 and 4.55",
        lived=(("4.36", "4.55"),),
        modern="cache.layers[i].keys",
        meaning="The keys of every layer, in a list that could be written to.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'key_cache'",
                cure="Write `cache.layers[i].keys`, and `len(cache.layers)` for "
                "`len(cache.key_cache)`.",
            ),
            Message(
                text="`cache.key_cache[idx]` is deprecated and will be removed in v4.56.0. Use "
                "`cache.layers[idx].keys` instead.",
                cure="The warning of 4.54 and 4.55; the cure is the same.",
                source="cache_utils.py",
            ),
        ),
        evidence=("DynamicCache.key_cache",),
    ),
    Name(
        key="value_cache",
        spelling="cache.value_cache[i]",
        kind=Kind.ATTRIBUTE,
        owner="DynamicCache, StaticCache and others; Cache in 4.54 and 4.55",
        lived=(("4.36", "4.55"),),
        modern="cache.layers[i].values",
        meaning="The values of every layer, in a list that could be written to.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'value_cache'",
                cure="Write `cache.layers[i].values`.",
            ),
            Message(
                text="`cache.value_cache[idx]` is deprecated and will be removed in v4.56.0. Use "
                "`cache.layers[idx].values` instead.",
                cure="The warning of 4.54 and 4.55; the cure is the same.",
                source="cache_utils.py",
            ),
        ),
        evidence=("DynamicCache.value_cache",),
    ),
    Name(
        key="cache[i]",
        spelling="cache[i]",
        kind=Kind.FORM,
        owner="DynamicCache; Cache from 4.54",
        lived=(("4.36", "4.57"),),
        modern="(cache.layers[i].keys, cache.layers[i].values)",
        meaning="The keys and values of layer i. `cache[0][0].shape[2]` is the number of tokens: "
        "`cache.get_seq_length()`.",
        messages=(
            Message(
                text="'DynamicCache' object is not subscriptable",
                cure="Write `cache.layers[i].keys` and `cache.layers[i].values`; for "
                "`past_key_values[0][0].shape[2]` write `past_key_values.get_seq_length()`.",
            ),
            Message(
                text="'EncoderDecoderCache' object is not subscriptable",
                cure="Write `cache.self_attention_cache.layers[i].keys` and "
                "`cache.cross_attention_cache.layers[i].keys`.",
            ),
            Message(
                text="Cache only has ... layers, attempted to access layer with index ...",
                cure="A DynamicCache made without a config has no layers before the first forward "
                "(4.36 to 4.57): ask `cache.get_seq_length()`, which is 0 then.",
                source="cache_utils.py",
            ),
        ),
        evidence=("DynamicCache.__getitem__",),
    ),
    Name(
        key="iteration",
        spelling="for keys, values in cache",
        kind=Kind.FORM,
        owner="DynamicCache; Cache from 4.54",
        lived=(("4.36", "4.57"),),
        modern="for layer in cache.layers: layer.keys, layer.values",
        meaning="Pairs of keys and values. Since 5.0 a DynamicCache yields triples, with the "
        "window (or None) as the third.",
        silent="Code that takes `layer[0]` and `layer[1]` of each item goes on working; code that "
        "counts or rebuilds tuples gets a third entry.",
        messages=(
            Message(
                text="too many values to unpack (expected 2)",
                cure="Iterate over `cache.layers` and read `.keys` and `.values`.",
            ),
            Message(
                text="'StaticCache' object is not iterable",
                cure="Iterate over `cache.layers` and read `.keys` and `.values`.",
            ),
        ),
    ),
    Name(
        key="from_legacy_cache",
        spelling="DynamicCache.from_legacy_cache(past)",
        kind=Kind.METHOD,
        owner="DynamicCache, EncoderDecoderCache",
        lived=(("4.36", "4.57"),),
        modern="DynamicCache(past)",
        meaning="A cache from a tuple of (keys, values). The constructor takes the same tuple "
        "since 5.0 (None gives an empty cache). For encoder-decoder models, build the two halves: "
        "`EncoderDecoderCache(DynamicCache(own), DynamicCache(cross))`. "
        "`mnemon.Cache.from_legacy(past)` takes both layouts.",
        messages=(
            Message(
                text="type object 'DynamicCache' has no attribute 'from_legacy_cache'",
                cure="Write `DynamicCache(past)`, or `mnemon.Cache.from_legacy(past)`.",
            ),
            Message(
                text="type object 'EncoderDecoderCache' has no attribute 'from_legacy_cache'",
                cure="Write `mnemon.Cache.from_legacy(past)`, or build the two halves.",
            ),
            Message(
                text="past_key_values should not be None in from_legacy_cache()",
                cure="Write `DynamicCache()` for an empty cache.",
                source="cache_utils.py",
            ),
        ),
        evidence=("DynamicCache.from_legacy_cache",),
    ),
    Name(
        key="to_legacy_cache",
        spelling="cache.to_legacy_cache()",
        kind=Kind.METHOD,
        owner="DynamicCache, EncoderDecoderCache",
        lived=(("4.36", "4.57"),),
        modern="tuple((layer.keys, layer.values) for layer in cache.layers)",
        meaning="A tuple with (keys, values) of every layer; of an EncoderDecoderCache with four "
        "tensors each, those of `self_attention_cache.layers` and `cross_attention_cache.layers`. "
        "`mnemon.Cache.to_legacy()` gives both of ours.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'to_legacy_cache'",
                cure="Pass the cache itself on; where a tuple is really wanted, write "
                "`tuple((layer.keys, layer.values) for layer in cache.layers)`.",
            ),
        ),
        evidence=("DynamicCache.to_legacy_cache",),
    ),
    Name(
        key="batch_split",
        spelling="cache.batch_split(...), DynamicCache.from_batch_splits(...)",
        kind=Kind.METHOD,
        owner="DynamicCache",
        lived=(("4.42", "4.53"),),
        modern="part = copy.deepcopy(cache); part.batch_select_indices(rows)",
        meaning="Cut a cache into smaller batches and put them together again.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'batch_split'",
                cure="Copy the cache and keep rows with `batch_select_indices`; "
                "mnemon.Cache has `select` and `merge`.",
            ),
        ),
        evidence=("DynamicCache.batch_split",),
    ),
)
