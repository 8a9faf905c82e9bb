"""One rule, one file; this is the table of them."""

from mnemon.migrate.rules.arguments import Arguments
from mnemon.migrate.rules.base import Rule
from mnemon.migrate.rules.bounds import Bounds
from mnemon.migrate.rules.classes import Classes
from mnemon.migrate.rules.crop import Crop
from mnemon.migrate.rules.from_legacy import FromLegacy
from mnemon.migrate.rules.gone import Gone
from mnemon.migrate.rules.helpers import Helpers
from mnemon.migrate.rules.indexing import Indexing
from mnemon.migrate.rules.iteration import Iteration
from mnemon.migrate.rules.lazy_initialization import LazyInitialization
from mnemon.migrate.rules.lists import Lists
from mnemon.migrate.rules.mask_sizes import MaskSizes
from mnemon.migrate.rules.max_length import MaxLength
from mnemon.migrate.rules.overrides import Overrides
from mnemon.migrate.rules.reflection import Reflection
from mnemon.migrate.rules.seen_tokens import SeenTokens
from mnemon.migrate.rules.to_legacy import ToLegacy
from mnemon.migrate.rules.tuples import Tuples
from mnemon.migrate.rules.update_arguments import UpdateArguments
from mnemon.migrate.rules.usable_length import UsableLength

__all__ = ["RULES", "Rule"]

RULES: tuple[Rule, ...] = (
    SeenTokens(),
    UsableLength(),
    MaxLength(),
    Bounds(),
    Lists(),
    Indexing(),
    Iteration(),
    ToLegacy(),
    FromLegacy(),
    UpdateArguments(),
    MaskSizes(),
    Crop(),
    LazyInitialization(),
    Classes(),
    Arguments(),
    Helpers(),
    Gone(),
    Reflection(),
    Overrides(),
    Tuples(),
)
