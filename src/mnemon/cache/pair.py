"""The cache of an encoder-decoder model."""

from collections.abc import Iterable

from mnemon import layers as kinds
from mnemon import policies
from mnemon import recipe as recipes
from mnemon.cache.plain import Cache
from mnemon.cache.state import CacheState
from mnemon.errors import RecipeError
from mnemon.hf.base import PairFacade
from mnemon.hf.kinds import decoder_config, layer_specs
from mnemon.hf.names import PreTrainedConfig
from mnemon.layers.base import CacheLayer
from mnemon.recipe import Recipe
from mnemon.report import Report, report

__all__ = ["CrossCache", "EncoderDecoderCache"]


class CrossCache(Cache):
    """The encoder's half of a pair: one `CrossLayer` per decoder layer.

    Args:
        config: the decoder's config.
        recipe: the pair's recipe, for the record.
        offloading: what models that rebuild their cross cache (T5Gemma) pass; must be False.

    Raises:
        RecipeError: offloading asked for.
    """

    def __init__(
        self, config: PreTrainedConfig, recipe: str | Recipe = "", *, offloading: bool = False
    ) -> None:
        if offloading:
            raise RecipeError(
                "Offloading is asked for by cache_implementation='offloaded'; with a mnemon cache "
                "it will be a tier of the recipe and is not there yet. Leave it out."
            )
        layers: list[CacheLayer] = [kinds.CrossLayer() for _ in layer_specs(config)]
        self._init_state(config, recipes.parse(recipe), layers)

    @classmethod
    def _around(
        cls, config: PreTrainedConfig, recipe: Recipe, layers: list[CacheLayer]
    ) -> "CrossCache":
        cache = object.__new__(CrossCache)
        cache._init_state(config, recipe, layers)
        return cache


class EncoderDecoderCache(Cache, PairFacade):
    """The cache of an encoder-decoder model: what the decoder saw, and the encoder's keys.

    Made by ``Cache(config)``. Token verbs act on the decoder's part, row verbs on both.
    """

    def __init__(self, config: PreTrainedConfig, recipe: str | Recipe = "") -> None:
        parsed = recipes.parse(recipe)
        specs = layer_specs(config)
        self._init_groups(
            config,
            parsed,
            policies.build_all(specs, parsed),
            [kinds.CrossLayer() for _ in specs],
        )

    def _init_groups(
        self,
        config: PreTrainedConfig,
        recipe: Recipe,
        own: list[CacheLayer],
        cross: list[CacheLayer],
    ) -> None:
        self._init_state(config, recipe, own)
        self._init_pair(Cache._of(config, recipe, own), CrossCache._around(config, recipe, cross))
        self._note_encoded()

    def _note_encoded(self) -> None:
        """Tell the models' code which cross layers are filled."""
        cross = self.cross_attention_cache.layers
        self.is_updated = {index: layer.batch_size > 0 for index, layer in enumerate(cross)}

    @property
    def _all_layers(self) -> Iterable[CacheLayer]:
        return [*self.layers, *self.cross_attention_cache.layers]

    def _groups(self) -> list[list[CacheLayer]]:
        return [self.layers, self.cross_attention_cache.layers]

    def _like(self, groups: list[list[CacheLayer]]) -> "Cache":
        other = object.__new__(EncoderDecoderCache)
        other._init_groups(self.config, self.recipe, groups[0], groups[1])
        return other

    def reset(self) -> None:
        super().reset()
        self._note_encoded()

    def _load_state(self, state: CacheState) -> None:
        super()._load_state(state)
        self._note_encoded()

    def report(self) -> Report:
        return report(
            groups={"decoder": self.layers, "encoder": self.cross_attention_cache.layers},
            title=f"{decoder_config(self.config).model_type} · {self.recipe}",
            num_tokens=self.num_tokens,
            num_known_tokens=self.num_known_tokens,
        )
