"""Names that tell how many tokens a cache holds, may hold, or should drop."""

from mnemon.names.model import Kind, Message, Name

__all__ = ["LENGTHS"]

LENGTHS = (
    Name(
        key="seen_tokens",
        spelling="cache.seen_tokens",
        kind=Kind.ATTRIBUTE,
        owner="DynamicCache, SinkCache; Cache from 4.38",
        lived=(("4.36", "4.53"),),
        modern="cache.get_seq_length()",
        meaning="How many tokens the cache has seen.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'seen_tokens'",
                cure="Write `cache.get_seq_length()`. Phi-3, MiniCPM and DeepSeek-V2 remote code "
                "reads it to find the first uncached token.",
            ),
            Message(
                text="The `seen_tokens` attribute is deprecated and will be removed in v4.41. Use "
                "the `cache_position` model input instead.",
                cure="The warning of 4.38 to 4.53 names the wrong successor for most code: write "
                "`cache.get_seq_length()`.",
                source="cache_utils.py",
            ),
        ),
        evidence=("DynamicCache.seen_tokens",),
    ),
    Name(
        key="_seen_tokens",
        spelling="cache._seen_tokens",
        kind=Kind.ATTRIBUTE,
        owner="DynamicCache, SinkCache",
        lived=(("4.39", "4.53"),),
        modern="cache.get_seq_length()",
        meaning="The counter behind `seen_tokens`. Each layer counts for itself today: writing "
        "to it has no successor.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute '_seen_tokens'",
                cure="Read `cache.get_seq_length()`; drop what writes to it.",
            ),
        ),
        evidence=("DynamicCache._seen_tokens",),
    ),
    Name(
        key="get_usable_length",
        spelling="cache.get_usable_length(new_length, layer_idx)",
        kind=Kind.METHOD,
        owner="Cache",
        lived=(("4.36", "4.53"),),
        modern="cache.get_seq_length(layer_idx)",
        meaning="Tokens of the past that stay once `new_length` more arrive: the whole length of "
        "an unbounded cache; for a bounded one that would overflow, bound - new_length.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'get_usable_length'",
                cure="Write `cache.get_seq_length(layer_idx)`: a DynamicCache has no bound. "
                "DeepSeek-V2, MiniCPM and InternLM2 remote code calls it in every attention.",
            ),
        ),
        evidence=("Cache.get_usable_length",),
    ),
    Name(
        key="get_max_length",
        spelling="cache.get_max_length()",
        kind=Kind.METHOD,
        owner="Cache",
        lived=(("4.36", "4.48"), ("5.13", None)),
        modern="cache.get_max_length()  # -1: no bound",
        meaning="Tokens the cache can hold. Up to 4.48 None meant no bound; since 5.13 it is -1. "
        "Between them it was called `get_max_cache_shape`.",
        silent="`if cache.get_max_length() is not None:` is always true since 5.13, and -1 is then "
        "taken for a length.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'get_max_length'",
                cure="From 4.49 to 5.12 write `cache.get_max_cache_shape()`; since 5.13 "
                "`cache.get_max_length()` is back, with -1 where it said None.",
            ),
            Message(
                text="`get_max_cache()` is deprecated for all Cache classes. Use "
                "`get_max_cache_shape()` instead. Calling `get_max_cache()` will raise error from "
                "v4.48",
                cure="The warning of 4.46 to 4.48 (it means `get_max_length`); the cure is the "
                "same.",
                source="cache_utils.py",
            ),
        ),
        evidence=("Cache.get_max_length",),
    ),
    Name(
        key="get_max_cache_shape",
        spelling="cache.get_max_cache_shape()",
        kind=Kind.METHOD,
        owner="Cache",
        lived=(("4.46", "5.19"),),
        modern="cache.get_max_length()",
        meaning="Tokens the cache can hold: None without a bound up to 4.53, -1 since 4.54.",
        silent="`if cache.get_max_cache_shape() is not None:` is always true since 4.54.",
        messages=(
            Message(
                text="'DynamicCache' object has no attribute 'get_max_cache_shape'",
                cure="Write `cache.get_max_length()` (5.13 and later).",
            ),
            Message(
                text="'StaticCache' object has no attribute 'get_max_cache_shape'",
                cure="Write `cache.get_max_length()` (5.13 and later).",
            ),
            Message(
                text="`get_max_cache_shape` is deprecated, and will be removed in version 5.16. "
                "Please use `get_max_length` instead",
                cure="The warning of 5.13 to 5.19; the cure is the same.",
                source="cache_utils.py",
            ),
        ),
        evidence=("Cache.get_max_cache_shape",),
    ),
    Name(
        key="max_cache_len",
        spelling="static_cache.max_cache_len",
        kind=Kind.ATTRIBUTE,
        owner="StaticCache",
        lived=(("4.38", "5.19"),),
        modern="static_cache.get_max_length()",
        meaning="Tokens a preallocated cache has room for.",
        messages=(
            Message(
                text="'StaticCache' object has no attribute 'max_cache_len'",
                cure="Write `cache.get_max_length()`, or `cache.layers[0].max_cache_len`.",
            ),
            Message(
                text="`max_cache_len` is deprecated, and will be removed in version 5.16. Please "
                "use `get_max_length()` instead",
                cure="The warning of 5.13 to 5.19; the cure is the same.",
                source="cache_utils.py",
            ),
        ),
        evidence=("StaticCache.max_cache_len",),
    ),
    Name(
        key="max_batch_size",
        spelling="static_cache.max_batch_size",
        kind=Kind.ATTRIBUTE,
        owner="StaticCache",
        lived=(("4.38", "4.44"), ("4.47", "5.19")),
        modern="static_cache.layers[0].batch_size",
        meaning="Rows a preallocated cache was made for (in 4.45 and 4.46 `batch_size`).",
        messages=(
            Message(
                text="'StaticCache' object has no attribute 'max_batch_size'",
                cure="A static layer learns its batch from the first update: read "
                "`cache.layers[0].batch_size` after it.",
            ),
        ),
        evidence=("StaticCache.max_batch_size",),
    ),
    Name(
        key="positive_crop",
        spelling="cache.crop(n), n > 0",
        kind=Kind.FORM,
        owner="DynamicCache (4.42), Cache (4.54)",
        lived=(("4.42", "5.19"),),
        modern="if n < cache.get_seq_length(): cache.crop(n - cache.get_seq_length())",
        meaning="n was the length to keep, and an n beyond it did nothing. Today the number says "
        "how many tokens go, and is negative. The `if` matters up to 5.13, where 0 empties.",
        messages=(
            Message(
                text="Calling `crop` with a positive value (`...`) is not supported. Please use a "
                "negative integer to remove that number of tokens from the cache instead.",
                cure="To keep n tokens write `if n < cache.get_seq_length(): "
                "cache.crop(n - cache.get_seq_length())`.",
                source="cache_utils.py",
            ),
            Message(
                text="Calling `crop` with a positive value is deprecated and will be removed in "
                "version 5.18. Please use a negative integer to remove that number of tokens from "
                "the cache instead.",
                cure="The warning of 5.15 to 5.19; the cure is the same.",
                source="cache_utils.py",
            ),
        ),
    ),
    Name(
        key="crop_zero",
        spelling="cache.crop(0)",
        kind=Kind.FORM,
        owner="DynamicCache, Cache",
        lived=(("4.42", "5.13"),),
        modern="cache.crop(-cache.get_seq_length())",
        meaning="Emptied the cache up to 5.13; removes nothing since 5.14. (`reset()` empties a "
        "DynamicCache in recent releases only: in 4.57 and 5.14 its length stays.)",
        silent="Code that empties a cache with `crop(0)` keeps every token since 5.14.",
    ),
    Name(
        key="activate_past_recording",
        spelling="cache.activate_past_recording()",
        kind=Kind.METHOD,
        owner="Cache",
        lived=(("5.14", None),),
        modern="cache.activate_past_recording()",
        meaning="Call it before the tokens that a later `crop` may take back: windows and "
        "recurrent states then keep what going back needs. Before 5.14 they could not go back.",
        messages=(
            Message(
                text="`crop` was called, but the current layer does not track past states, and "
                "the sliding window size was already reached. Call `activate_past_recording` "
                "before `crop` to be able to rollback the cache.",
                cure="Call `cache.activate_past_recording()` before the forward passes that may "
                "be taken back, or use mnemon.Cache, whose report says what can go back.",
                source="cache_utils.py",
            ),
            Message(
                text="Cannot `crop` a `DynamicSlidingWindowLayer` after it has seen more tokens "
                "than itssliding window (otherwise some states are lost)",
                cure="The message of 4.56 to 5.13 (sic): such a cache cannot go back; compute it "
                "again, or move to 5.14.",
                source="cache_utils.py",
            ),
            Message(
                text="'DynamicCache' object has no attribute 'activate_past_recording'",
                cure="New in 5.14; before it, leave the call out and do not crop windows.",
            ),
        ),
        evidence=("Cache.activate_past_recording",),
    ),
)
