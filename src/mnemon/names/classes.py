"""Cache classes that are gone."""

from mnemon.names.model import Kind, Message, Name

__all__ = ["CLASSES"]


def _gone(
    name: str,
    since: str,
    until: str,
    modern: str,
    meaning: str,
    silent: str = "",
    back: str | None = None,
    evidence: tuple[str, ...] = (),
) -> Name:
    """A class of ``transformers.cache_utils``; importing it fails once it is gone."""
    lived: tuple[tuple[str, str | None], ...] = ((since, until),)
    messages: tuple[Message, ...] = ()
    if back is not None:
        lived = (*lived, (back, None))
    else:
        messages = tuple(
            Message(text=f"cannot import name '{name}' from '{module}'", cure=f"Write `{modern}`.")
            for module in ("transformers", "transformers.cache_utils")
        )
    return Name(
        key=name,
        spelling=name,
        kind=Kind.CLASS,
        owner="transformers.cache_utils",
        lived=lived,
        modern=modern,
        meaning=meaning,
        silent=silent,
        messages=messages,
        evidence=evidence or (name,),
    )


CLASSES = (
    _gone(
        "SinkCache",
        "4.36",
        "4.57",
        "DynamicCache()",
        "Kept the first tokens and a window (StreamingLLM) and rotated the kept keys anew. From "
        "4.53 its constructor only raises. Neither transformers nor mnemon has a successor that "
        "drops tokens yet: a plain cache keeps them all.",
    ),
    _gone(
        "HybridCache",
        "4.42",
        "4.57",
        "StaticCache(config=config, max_cache_len=n)",
        "Preallocated, with windows where the config has them. StaticCache reads that from the "
        'config; so does mnemon.Cache(config, "static(n)").',
    ),
    _gone(
        "HybridChunkedCache",
        "4.51",
        "4.57",
        "StaticCache(config=config, max_cache_len=n)",
        "The same for chunked attention (Llama 4).",
    ),
    _gone(
        "OffloadedHybridCache",
        "4.52",
        "4.57",
        "StaticCache(config=config, max_cache_len=n, offloading=True)",
        "HybridCache with its layers in host memory; CUDA only.",
    ),
    _gone(
        "SlidingWindowCache",
        "4.42",
        "4.57",
        "StaticCache(config=config, max_cache_len=n)",
        "Preallocated, a window in every layer. The name came back as an alias of StaticCache, "
        "with StaticCache's arguments.",
        silent="The alias takes `max_cache_len` second: the old order (config, max_batch_size, "
        "max_cache_len) makes a cache of max_batch_size tokens.",
        back="5.6",
    ),
    _gone(
        "OffloadedCache",
        "4.44",
        "4.57",
        "DynamicCache(config=config, offloading=True)",
        "DynamicCache with its layers in host memory; CUDA only.",
    ),
    _gone(
        "OffloadedStaticCache",
        "4.45",
        "4.57",
        "StaticCache(config=config, max_cache_len=n, offloading=True)",
        "StaticCache with its layers in host memory; CUDA only.",
    ),
    _gone(
        "QuantoQuantizedCache",
        "4.42",
        "4.57",
        'QuantizedCache(backend="quanto", config=config, nbits=4)',
        "Quantized by optimum-quanto. It took a QuantizedCacheConfig up to 4.55.",
    ),
    _gone(
        "HQQQuantizedCache",
        "4.42",
        "4.57",
        'QuantizedCache(backend="hqq", config=config, nbits=4)',
        "Quantized by hqq. It took a QuantizedCacheConfig up to 4.55.",
    ),
    _gone(
        "QuantizedCacheConfig",
        "4.42",
        "4.55",
        'QuantizedCache(backend="quanto", config=config, nbits=4, residual_length=128)',
        "Held the settings of a quantized cache; they are arguments today.",
    ),
    _gone(
        "CacheConfig",
        "4.42",
        "4.55",
        "dict",
        "Base of the cache configs; generate takes a plain dict as `cache_config`.",
    ),
    _gone(
        "MambaCache",
        "4.43",
        "5.4",
        "DynamicCache(config=config)",
        "The states of a Mamba model. From 4.56 on it lived in the Mamba model's own file, no "
        "longer in cache_utils; since 5.5 a DynamicCache holds states too.",
        evidence=(
            "MambaCache",
            'cache_utils.py:"MambaCache"',
            "models/mamba/modeling_mamba.py:class MambaCache",
        ),
    ),
)
