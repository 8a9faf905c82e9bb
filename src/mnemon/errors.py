"""One tree of errors. Every message says what came, what was expected and what to do.

MnemonError
├── RecipeError             a recipe that cannot be parsed, or that asks for what is not there
├── CacheError              a cache verb that cannot be carried out; the cache is unchanged
│   ├── UnsupportedVerb     this kind of layer cannot do that, ever (documented per layer)
│   ├── CapacityError       a preallocated cache is full
│   ├── TierError           a tier (host, disk) cannot keep or give back its bytes
│   │   └── DiskFull        no room on the disk, or within what the tier may take of it
│   └── PrefixMismatch      the cache holds other tokens than the prompt
├── FileError               a cache file that cannot be used
│   ├── NotACacheFile       something else (missing, empty, text, model weights, a directory)
│   ├── UnsafeFile          pickle or zip: never opened, it could run code
│   ├── TruncatedFile       the end is missing
│   ├── DamagedFile         bits differ from what was written
│   ├── NewerVersion        written by a newer mnemon
│   └── WrongModel          written for another model, other weights or another dtype
├── ModelError              a model or a config that cannot be loaded or served
│   └── NotServed           in this version of transformers, the model takes its own cache only
├── PlanError               a config whose cache cannot be computed in advance
├── DiffusionError          a denoising cache that cannot be attached, or not with these options
│   └── NoSites             a model in which nothing is found to attach a cache to
├── LearnedMemoryError      a model that cannot take a learned memory, or one that does not fit it
├── ExportError             a model that cannot be exported, or an export that cannot be used
├── MigrateError            code that cannot be migrated: a path, a target, a file
├── ZooError                the bundled model, its data or its training
└── DependencyError         a package is missing; the message says what to install
    └── VersionError        transformers is there, in a version that mnemon does not work with
"""

__all__ = [
    "CacheError",
    "CapacityError",
    "DamagedFile",
    "DependencyError",
    "DiffusionError",
    "DiskFull",
    "ExportError",
    "FileError",
    "LearnedMemoryError",
    "MigrateError",
    "MnemonError",
    "ModelError",
    "NewerVersion",
    "NoSites",
    "NotACacheFile",
    "NotServed",
    "PlanError",
    "PrefixMismatch",
    "RecipeError",
    "TierError",
    "TruncatedFile",
    "UnsafeFile",
    "UnsupportedVerb",
    "VersionError",
    "WrongModel",
    "ZooError",
]


class MnemonError(Exception):
    """Base of everything mnemon raises on purpose."""


class RecipeError(MnemonError, ValueError):
    """A recipe cannot be parsed, combines what cannot be combined, or names what is not there."""


class CacheError(MnemonError, RuntimeError):
    """A verb of a cache or of a cache layer cannot be carried out."""


class UnsupportedVerb(CacheError):
    """This kind of layer cannot carry out this verb; its docstring says so."""


class CapacityError(CacheError):
    """More tokens than a preallocated cache was made for."""


class TierError(CacheError):
    """A tier cannot keep bytes, or cannot read those it kept."""


class DiskFull(TierError):
    """The disk, its quota, or what the tier may take of it is used up."""


class PrefixMismatch(CacheError):
    """The cache holds tokens that the prompt does not begin with."""


class FileError(MnemonError, OSError):
    """A cache file cannot be read or written."""


class NotACacheFile(FileError):
    """The path does not hold a mnemon cache."""


class UnsafeFile(FileError):
    """A pickle or zip: refused without being opened."""


class TruncatedFile(FileError):
    """The file ends before its header says it should."""


class DamagedFile(FileError):
    """The bytes are not those that were written."""


class NewerVersion(FileError):
    """The file's format is newer than this mnemon understands."""


class WrongModel(FileError):
    """The cache was computed by another model, with other weights, or in another dtype."""


class ModelError(MnemonError, ValueError):
    """A model or a config cannot be loaded, or its cache cannot be built."""


class NotServed(ModelError):
    """In the installed version of transformers this model takes only a cache class of its own."""


class PlanError(MnemonError, ValueError):
    """The bytes of a config's cache cannot be computed in advance."""


class DiffusionError(MnemonError, ValueError):
    """A cache between denoising steps cannot be attached, configured, fitted or continued."""


class NoSites(DiffusionError):
    """A model has none of the blocks and sublayers that caching inside it attaches to."""


class LearnedMemoryError(MnemonError, ValueError):
    """A model cannot take a learned memory (GRC, DMC, DMS), or what was saved does not fit it."""


class ZooError(MnemonError, RuntimeError):
    """The bundled model, its data or its training failed."""


class ExportError(MnemonError, ValueError):
    """A model cannot be exported as asked, or an export cannot be loaded or run."""


class MigrateError(MnemonError, ValueError):
    """Code cannot be migrated: a path that is not there, an unknown target, a damaged file."""


class DependencyError(MnemonError, ImportError):
    """A package is missing."""


class VersionError(DependencyError):
    """transformers is installed in a version that mnemon does not work with."""
