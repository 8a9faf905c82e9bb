"""Arguments and ways of calling: what a cache, `forward` and `generate` take."""

from mnemon.names.model import Kind, Message, Name

__all__ = ["CALLS"]

CALLS = (
    Name(
        key="cache_kwargs",
        spelling="cache.update(keys, values, layer_idx, cache_kwargs)",
        kind=Kind.ARGUMENT,
        owner="Cache.update",
        lived=(("4.36", "5.3"),),
        modern="cache.update(keys, values, layer_idx)",
        meaning='A dict with "sin", "cos" and "cache_position". Caches count for themselves '
        "today and rotate nothing.",
        silent="Since 5.4 `update` takes any further arguments and ignores them.",
        evidence=("Cache.update(cache_kwargs)",),
    ),
    Name(
        key="cache_position",
        spelling="cache.get_mask_sizes(cache_position, layer_idx)",
        kind=Kind.ARGUMENT,
        owner="Cache.get_mask_sizes",
        lived=(("4.53", "5.3"),),
        modern="cache.get_mask_sizes(query_length, layer_idx)",
        meaning="A tensor with the positions of the new tokens; since 5.4 their number, an int.",
        silent="Since 5.4 a tensor is taken as the number: the first size comes back as a tensor "
        "with wrong numbers.",
        messages=(
            Message(
                text="The remote code model you are currently using seems to expect "
                "`cache_position`. This arg has been removed from the Transformers library, and "
                "will stop being created in `generate` even for remote code models in a future "
                "release. Please open a PR on the remote code hub repo to remove any usage of "
                "`cache_position`.",
                cure="Harmless until then. In your own code, count from "
                "`past_key_values.get_seq_length()`.",
                source="generation/utils.py",
            ),
            Message(
                text="`cache_position` must be provided for SlidingWindowCache.",
                cure='Up to 4.53 `update` wanted `{"cache_position": positions}`; later ones do '
                "not: move to 5.4 or later.",
                source="cache_utils.py",
            ),
        ),
        evidence=("Cache.get_mask_sizes(cache_position)",),
    ),
    Name(
        key="lazy_initialization",
        spelling="layer.lazy_initialization(keys)",
        kind=Kind.ARGUMENT,
        owner="DynamicLayer, StaticLayer",
        lived=(("4.56", "4.57"),),
        modern="layer.lazy_initialization(keys, values)",
        meaning="Allocates a layer after the shapes of the first update; values may be of "
        "another width.",
        messages=(
            Message(
                text="lazy_initialization() missing 1 required positional argument: 'value_states'",
                cure="Pass the values as well.",
            ),
        ),
    ),
    Name(
        key="static_cache_arguments",
        spelling="StaticCache(config, max_batch_size, max_cache_len, device, dtype)",
        kind=Kind.ARGUMENT,
        owner="StaticCache",
        lived=(("4.38", "4.55"),),
        modern="StaticCache(config=config, max_cache_len=n)",
        meaning="Batch, device and dtype are learned from the first update since 4.56.",
        silent="Since 4.56 the second positional argument is `max_cache_len`: "
        "`StaticCache(config, 1, 2048)` makes a cache of ONE token with offloading on.",
        messages=(
            Message(
                text="StaticCache.__init__() missing 1 required positional argument: "
                "'max_cache_len'",
                cure="Name the arguments: `StaticCache(config=config, max_cache_len=n)`.",
            ),
        ),
        evidence=("StaticCache.__init__(max_batch_size)", "StaticCache.__init__(args)"),
    ),
    Name(
        key="num_hidden_layers",
        spelling="DynamicCache(num_hidden_layers=n)",
        kind=Kind.ARGUMENT,
        owner="DynamicCache",
        lived=(("4.45", "4.49"),),
        modern="DynamicCache(config=config)",
        meaning="The number of layers; they are made from the config, or as they are met.",
        messages=(
            Message(
                text="DynamicCache.__init__() got an unexpected keyword argument "
                "'num_hidden_layers'",
                cure="Write `DynamicCache()` or `DynamicCache(config=config)`.",
            ),
        ),
        evidence=("DynamicCache.__init__(num_hidden_layers)",),
    ),
    Name(
        key="tuple_to_forward",
        spelling="model(ids, past_key_values=((k, v), ...))",
        kind=Kind.FORM,
        owner="models of the tuple days: GPT-2, BART, T5, Bloom and others",
        lived=(("4.36", "4.57"),),
        modern="model(ids, past_key_values=mnemon.Cache.from_legacy(past))",
        meaning="A tuple with (keys, values) of every layer, or with four tensors for "
        "encoder-decoder models. It went model by model: Llama and Mistral took it until 4.47, "
        "Bloom, Falcon, GPT-Neo and T5 until 4.53, GPT-2 and BART until 4.57.",
        silent="`DynamicCache(past)` of a tuple with four tensors per layer drops the encoder's "
        "two: logits are wrong. `mnemon.Cache.from_legacy(past)` keeps them.",
        messages=(
            Message(
                text="'tuple' object has no attribute 'get_seq_length'",
                cure="Wrap it: `mnemon.Cache.from_legacy(past)` takes both layouts. With "
                "transformers alone, for a decoder-only model: `DynamicCache(past)` (5.0 and "
                "later) or `DynamicCache.from_legacy_cache(past)` (4.x). With four tensors per "
                "layer `DynamicCache(past)` loses the encoder's without an error: build the two "
                "halves of an `EncoderDecoderCache`.",
            ),
            Message(
                text="'list' object has no attribute 'get_seq_length'",
                cure="The same for a list.",
            ),
            Message(
                text="We detected that you are passing `past_key_values` as a tuple and this is "
                "deprecated and will be removed in v4.43. Please use an appropriate `Cache` class",
                cure="The warning of 4.42 to 4.44; the cure is the same.",
                source="models/llama/modeling_llama.py",
            ),
            Message(
                text="We detected that you are passing `past_key_values` as a tuple of tuples. "
                "This is deprecated and will be removed in v4.47. Please convert your cache or use "
                "an appropriate `Cache` class",
                cure="The warning of 4.45 to 4.47; the cure is the same.",
                source="models/llama/modeling_llama.py",
            ),
            Message(
                text="The `past_key_values` should be either a `Cache` object or `None`.",
                cure="The error of 4.48 to 4.53; the cure is the same.",
                source="models/llama/modeling_llama.py",
            ),
            Message(
                text="Passing a tuple of `past_key_values` is deprecated and will be removed in "
                "Transformers v4.58.0. You should pass an instance of `EncoderDecoderCache` "
                "instead, e.g. `past_key_values=EncoderDecoderCache.from_legacy_cache("
                "past_key_values)`.",
                cure="The warning of 4.52 to 4.57; the method it names is gone in 5.0: "
                "`mnemon.Cache.from_legacy(past)`.",
                source="models/bart/modeling_bart.py",
            ),
        ),
    ),
    Name(
        key="tuple_to_generate",
        spelling="model.generate(ids, past_key_values=((k, v), ...))",
        kind=Kind.FORM,
        owner="GenerationMixin.generate",
        lived=(("4.36", "4.57"),),
        modern="model.generate(ids, past_key_values=mnemon.Cache.from_legacy(past))",
        meaning="The same tuple, given to generate. With transformers alone: `DynamicCache(past)`, "
        "for decoder-only models.",
        messages=(
            Message(
                text="Passing a tuple of `past_key_values` is not supported anymore. Please use a "
                "`Cache` instance.",
                cure="Wrap it: `mnemon.Cache.from_legacy(past)`, or `DynamicCache(past)` for a "
                "decoder-only model.",
                source="generation/utils.py",
            ),
            Message(
                text="Passing a tuple of `past_key_values` is deprecated and will be removed in "
                "Transformers v4.58.0. You should pass an instance of `Cache` instead.",
                cure="The warning of 4.57; the cure is the same.",
                source="generation/utils.py",
            ),
            Message(
                text="... does not support an instance of `Cache` as `past_key_values`. Please "
                "check the model documentation for supported cache formats.",
                cure="The other way round, up to 4.53: that model still wanted a tuple. Move to a "
                "later transformers.",
                source="generation/utils.py",
            ),
            Message(
                text="This model does not support `Cache` instances, it only supports the legacy "
                "cache format (tuple of tuples). `cache_implementation` (set to ...) will be "
                "ignored.",
                cure="The same, as a warning, up to 4.56.",
                source="generation/utils.py",
            ),
        ),
    ),
    Name(
        key="return_legacy_cache",
        spelling="model.generate(ids, return_legacy_cache=True)",
        kind=Kind.ARGUMENT,
        owner="GenerationMixin.generate",
        lived=(("4.42", "4.57"),),
        modern="tuple((layer.keys, layer.values) for layer in out.past_key_values.layers)",
        meaning="Asked generate for a tuple in place of the cache.",
        messages=(
            Message(
                text="The following `model_kwargs` are not used by the model: "
                "['return_legacy_cache'] (note: typos in the generate arguments will also show up "
                "in this list)",
                cure="Drop it, and read `out.past_key_values` as a cache.",
            ),
            Message(
                text="From v4.47 onwards, when a model cache is to be returned, `generate` will "
                "return a `Cache` instance instead by default (as opposed to the legacy tuple of "
                "tuples format). If you want to keep returning the legacy format, please set "
                "`return_legacy_cache=True`.",
                cure="The warning of 4.45 to 4.48: leave the argument out, and read a cache.",
                source="generation/utils.py",
            ),
        ),
        evidence=("generation/utils.py:return_legacy_cache",),
    ),
    Name(
        key="is_torch_fx_available",
        spelling="from transformers.utils import is_torch_fx_available",
        kind=Kind.FORM,
        owner="transformers.utils",
        lived=(("4.36", "4.57"),),
        modern="True",
        meaning="No part of the cache API, but in every remote-code file of its days: DeepSeek-V2, "
        "MiniCPM and others fail on this import before they reach the cache.",
        messages=(
            Message(
                text="cannot import name 'is_torch_fx_available' from "
                "'transformers.utils.import_utils'",
                cure="Drop the import and what it guards (torch.fx is part of every torch).",
            ),
        ),
        evidence=("utils/__init__.py:is_torch_fx_available",),
    ),
    Name(
        key="past_key_value",
        spelling="attention(hidden_states, past_key_value=cache)",
        kind=Kind.ARGUMENT,
        owner="forward of attention and decoder layers",
        lived=(("4.36", "4.57"),),
        modern="attention(hidden_states, past_key_values=cache)",
        meaning="The singular, inside the models; 4.56 and 4.57 take both.",
        silent="Since 5.0 most layers take any keyword and pass it on: a `past_key_value=` that "
        "nobody reads leaves the cache empty, and only the speed tells.",
        evidence=(
            "models/llama/modeling_llama.py:past_key_value: Optional",
            'models/llama/modeling_llama.py:"past_key_value"',
        ),
    ),
    Name(
        key="GenerationMixin",
        spelling="class Model(PreTrainedModel) with generate()",
        kind=Kind.FORM,
        owner="PreTrainedModel",
        lived=(("4.36", "4.51"),),
        modern="class Model(PreTrainedModel, GenerationMixin)",
        meaning="No part of the cache API, but in old remote code beside it: PreTrainedModel "
        "brought `generate` until 4.51.",
        messages=(
            Message(
                text="object has no attribute 'generate'",
                cure="Derive the model from GenerationMixin too: "
                "`from transformers import GenerationMixin`.",
            ),
            Message(
                text="... has generative capabilities, as `prepare_inputs_for_generation` is "
                "explicitly defined. However, it doesn't directly inherit from `GenerationMixin`.",
                cure="The warning before that; the cure is the same.",
                source="modeling_utils.py",
            ),
        ),
        evidence=(
            "modeling_utils.py:class PreTrainedModel(nn.Module, ModuleUtilsMixin, GenerationMixin",
        ),
    ),
)
