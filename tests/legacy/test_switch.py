"""On, off, counted; and nothing of it is left behind."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    GenerationMixin,
    PreTrainedModel,
    cache_utils,
    masking_utils,
    modeling_rope_utils,
    modeling_utils,
    utils,
)
from transformers.generation import utils as generation_utils
from transformers.models.auto import auto_factory
from transformers.utils import import_utils

import mnemon
from mnemon.errors import MnemonError
from mnemon.hf.names import PreTrainedConfig
from mnemon.legacy import classes as legacy_classes
from mnemon.legacy import generation, patches
from mnemon.legacy.switch import SWITCH


def below(cls: type) -> Iterator[type]:
    yield cls
    for sub in cls.__subclasses__():
        yield from below(sub)


def everything() -> list[Any]:
    """Whatever the shim touches, or might."""
    caches = {base for cls in below(cache_utils.Cache) for base in cls.__mro__}
    caches = {cls for cls in caches if not cls.__module__.startswith("mnemon.legacy")}
    layers = {value for value in vars(cache_utils).values() if isinstance(value, type)}
    modules = (
        auto_factory, cache_utils, generation_utils, import_utils, masking_utils,
        modeling_rope_utils, modeling_utils, utils, *legacy_classes._packages(),
        *(m for name, m in sys.modules.items() if name.startswith("transformers_modules.")),
    )  # fmt: skip
    classes = (GenerationMixin, PreTrainedModel, PreTrainedConfig, torch.nn.Module)
    named = sorted(caches | layers, key=lambda cls: (cls.__module__, cls.__qualname__))
    return [*modules, *classes, *named]


def contents() -> dict[int, list[tuple[str, Any]]]:
    # The values themselves, so that none of them can be freed and its id be given away.
    return {id(owner): _items(owner) for owner in everything()}


def _items(owner: Any) -> list[tuple[str, Any]]:
    # Python itself notes in a module which of its lines have warned.
    return [item for item in vars(owner).items() if item[0] != "__warningregistry__"]


def assert_same(before: dict[int, list[tuple[str, Any]]]) -> None:
    for owner in everything():
        assert id(owner) in before, f"{owner} is new"
        was, now = before[id(owner)], _items(owner)
        assert [name for name, _ in was] == [name for name, _ in now], owner
        for (name, old), (_, new) in zip(was, now, strict=True):
            assert old is new, f"{owner}.{name}"


def test_off_is_as_before_attribute_by_attribute() -> None:
    before = contents()
    with mnemon.legacy.enable():
        touched = SWITCH._patches.owners()
        assert {id(owner) for owner in touched} <= set(before)
        assert contents() != before
        from transformers.cache_utils import HybridCache, SinkCache

        assert SinkCache(4, 1) is not None
        if not transformers.__version__.startswith("4."):
            assert transformers.HybridCache is HybridCache
    assert_same(before)
    assert len(touched) >= 7


def test_off_again_after_a_model_has_run(old_model: Any, recorded: Any) -> None:
    from .record import answers

    model = old_model("phi3")
    before, own = contents(), dict(vars(model))
    with mnemon.legacy.enable():
        answers(model, "phi3")
    assert_same(before)
    assert list(vars(model)) == list(own)
    with pytest.raises((AttributeError, RuntimeError, TypeError)):
        answers(model, "phi3")


def test_an_error_inside_the_block_restores() -> None:
    before = contents()
    with pytest.raises(ZeroDivisionError), mnemon.legacy.enable():
        1 / 0  # noqa: B018
    assert_same(before)


def test_an_error_while_switching_on_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(generation, "install", fail)
        with pytest.raises(ZeroDivisionError):
            mnemon.legacy.enable()
    assert not mnemon.legacy.is_enabled()
    assert_same(before)


def test_calls_are_counted() -> None:
    before = contents()
    mnemon.legacy.enable()
    with mnemon.legacy.enable():
        assert mnemon.legacy.is_enabled()
    assert mnemon.legacy.is_enabled()
    mnemon.legacy.enable()
    mnemon.legacy.disable()
    assert mnemon.legacy.is_enabled()
    mnemon.legacy.disable()
    assert not mnemon.legacy.is_enabled()
    assert_same(before)


def test_a_block_that_was_ended_inside_ends_once() -> None:
    with mnemon.legacy.enable():
        mnemon.legacy.disable()
        assert not mnemon.legacy.is_enabled()
    block = mnemon.legacy.enable()
    with block, mnemon.legacy.enable():
        pass
    with block:  # its end was reached before
        pass
    assert not mnemon.legacy.is_enabled()


def test_disable_without_enable_says_so() -> None:
    with pytest.raises(MnemonError, match="without an enable"):
        mnemon.legacy.disable()


def test_what_others_set_since_is_left_alone_and_said() -> None:
    class Owner:
        kept = 1

    done = patches.Patches()
    done.put(Owner, "kept", 2)
    done.put(Owner, "new", 3)
    Owner.kept = 4
    with pytest.warns(RuntimeWarning, match=r"Owner\.kept"):
        done.undo()
    assert Owner.kept == 4
    assert not hasattr(Owner, "new")


def test_importing_it_leaves_torch_alone() -> None:
    code = (
        "import mnemon, sys\n"
        "mnemon.legacy.LegacyWarning, mnemon.legacy.enable\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
