"""One adapter per family of transformers' releases, chosen once, when this is first imported.

An adapter is a module with the names below; nothing else in mnemon asks for a version. A release
that changes what they rest on gets a file of its own, named after the first release it serves.

======================  ===========================================================================
``PreTrainedConfig``    the class of every config
``CacheBase``           what a cache derives from
``PairBase``            what the cache of an encoder-decoder model derives from
``Calls``               methods that only this release calls on a cache, or calls otherwise
``prepare_layers``      what has to be told to the layers of every new cache
``layer_types``         a decoder's config -> name and options of every layer, in 5.23's words
``layer_classes``       name of a layer -> transformers' own growing and static class, or None
``why_not_served``      why no common cache can serve a config, or None
``tokens_to_remove``    what the argument of ``crop`` means
``crop_layer``          takes tokens back from a layer of transformers' own
``collects_attentions`` whether modules are being watched for attention weights
``ONLY_WITH_PROMPT``    inputs that ``generate`` feeds with the prompt only
``CHUNKS_CACHED_AGAIN`` whether ``prefill_chunk_size`` begins with the first token, cached or not
``FEEDS_CACHED_AGAIN``  whether drafting feeds the whole prompt although a part of it is cached
``GROW_ONLY``           model types whose attention takes every key it is handed for a real one, so
                        that a preallocated layer gives other tokens (as in ``StaticCache``)
``PADDING_POSITION``    the position that ``generate`` gives to padding
``announce_cached``     tells a `generate` call that takes new tokens alone how many are cached
``first_inputs``        a model's inputs for the next tokens of a prompt, as ``generate`` makes them
======================  ===========================================================================
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mnemon.errors import DependencyError
from mnemon.hf.versions.supported import REQUIREMENT, adapter_for

try:
    from transformers import __version__ as _installed
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise DependencyError(
        f'mnemon keeps caches of transformers, which is missing: pip install "{REQUIREMENT}"'
    ) from error

if TYPE_CHECKING:
    from mnemon.hf.versions import v5_22 as current
else:
    current = import_module(f"{__name__}.{adapter_for(_installed)}")

__all__ = ["current", "installed"]

installed: str = _installed
"""The version of transformers in use."""
