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
    before: tuple[str, ...] = (),
) -> Name:
    """A class of ``transformers.cache_utils``; importing it fails once it is gone.

    `before`: what it said while it was there.
    """
    lived: tuple[tuple[str, str | None], ...] = ((since, until),)
    if back is not None:
        lived = (*lived, (back, None))
    messages = tuple(
        Message(text=f"cannot import name '{name}' from '{module}'", cure=f"Write `{modern}`.")
        for module in ("transformers", "transformers.cache_utils")
    )
    messages += tuple(
        Message(text=text, cure=f"Write `{modern}`.", source="cache_utils.py") for text in before
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
        before=(
            "`SinkCache` has been moved as a `custom_generate` repository on the Hub: "
            "https://huggingface.co/transformers-community/sink_cache. See the repository "
            "for usage examples.",
            "`SinkCache` is deprecated and will be removed in v4.53.0. You can achieve "
            "similar functionality by using a model with a sliding window attention "
            "mechanism, or by expanding RoPE and optionally using an offloaded cache "
            "implementation.",
        ),
    ),
    _gone(
        "HybridCache",
        "4.42",
        "4.57",
        "StaticCache(config=config, max_cache_len=n)",
        "Preallocated, with windows where the config has them. StaticCache reads that from the "
        'config; so does mnemon.Cache(config, "static(n)").',
        before=(
            "`HybridCache` is deprecated and will be removed in version v4.59 Use "
            "`StaticCache(...)` instead which will correctly infer the type of each layer.",
            "`cache_position` must be provided for HybridCache.",
        ),
    ),
    _gone(
        "HybridChunkedCache",
        "4.51",
        "4.57",
        "StaticCache(config=config, max_cache_len=n)",
        "The same for chunked attention (Llama 4).",
        before=(
            "`HybridChunkedCache` is deprecated and will be removed in version v4.59 Use "
            "`StaticCache(...)` instead which will correctly infer the type of each layer.",
        ),
    ),
    _gone(
        "OffloadedHybridCache",
        "4.52",
        "4.57",
        "StaticCache(config=config, max_cache_len=n, offloading=True)",
        "HybridCache with its layers in host memory; CUDA only.",
        before=(
            "`OffloadedHybridCache` is deprecated and will be removed in version v4.59 Use "
            "`StaticCache(..., offload=True)` instead which will correctly infer the type "
            "of each layer.",
        ),
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
        before=(
            "`SlidingWindowCache` is deprecated and will be removed in version v4.59 Use "
            "`StaticCache(...)` instead which will correctly infer the type of each layer.",
        ),
    ),
    _gone(
        "OffloadedCache",
        "4.44",
        "4.57",
        "DynamicCache(config=config, offloading=True)",
        "DynamicCache with its layers in host memory; CUDA only.",
        before=(
            "`OffloadedCache` is deprecated and will be removed in version v4.59 Use "
            "`DynamicCache(offloading=True)` instead",
            "OffloadedCache can only be used with a GPU",
        ),
    ),
    _gone(
        "OffloadedStaticCache",
        "4.45",
        "4.57",
        "StaticCache(config=config, max_cache_len=n, offloading=True)",
        "StaticCache with its layers in host memory; CUDA only.",
        before=(
            "`OffloadedStaticCache` is deprecated and will be removed in version v4.59 Use "
            "`StaticCache(..., offloading=True)` instead",
        ),
    ),
    _gone(
        "QuantoQuantizedCache",
        "4.42",
        "4.57",
        'QuantizedCache(backend="quanto", config=config, nbits=4)',
        "Quantized by optimum-quanto. It took a QuantizedCacheConfig up to 4.55.",
        before=(
            "`QuantoQuantizedCache` is deprecated and will be removed in version v4.59 Use "
            "`QuantizedCache(backend='quanto', ...)` instead.",
        ),
    ),
    _gone(
        "HQQQuantizedCache",
        "4.42",
        "4.57",
        'QuantizedCache(backend="hqq", config=config, nbits=4)',
        "Quantized by hqq. It took a QuantizedCacheConfig up to 4.55.",
        before=(
            "`HQQQuantizedCache` is deprecated and will be removed in version v4.59 Use "
            "`QuantizedCache(backend='hqq', ...)` instead.",
        ),
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
        before=(
            "CacheConfig is deprecated and will be removed in v4.55.0 in favor of a simpler"
            " dictionary.",
        ),
    ),
    _gone(
        "MambaCache",
        "4.39",
        "5.4",
        "DynamicCache(config=config)",
        "The states of a Mamba model. From 4.56 on it lived in the Mamba model's own file, no "
        "longer in cache_utils; since 5.5 a DynamicCache holds states too.",
        evidence=(
            "MambaCache",
            'cache_utils.py:"MambaCache"',
            "models/mamba/modeling_mamba.py:class MambaCache",
        ),
        before=(
            "Importing `MambaCache` from `transformers.cache_utils` is deprecated and will "
            "be removed in a future version. Please import it from `transformers` or "
            "`transformers.models.mamba.cache_mamba` instead.",
        ),
    ),
)
