"""One adapter is chosen, once; a release that mnemon does not work with gets one clear message."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mnemon
from mnemon.errors import DependencyError, NotServed, VersionError
from mnemon.hf import versions
from mnemon.hf.kinds import layer_specs
from mnemon.hf.names import PreTrainedConfig
from mnemon.hf.versions.supported import ADAPTERS, REQUIREMENT, adapter_for, release
from mnemon.layers import WindowLayer
from releases import RELEASE, since

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "mnemon"
FILES = sorted((SOURCES / "hf" / "versions").glob("v*.py"))


# -- which releases --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("4.57.0", "v4_57"), ("4.57.6", "v4_57"), ("5.14.1", "v5_14"), ("5.18.0", "v5_14"),
        ("5.19.0", "v5_19"), ("5.21.2", "v5_19"), ("5.22.0", "v5_22"), ("5.23.0", "v5_22"),
        ("5.23.0.dev0", "v5_22"),
    ],
)  # fmt: skip
def test_every_supported_release_has_an_adapter(version: str, module: str) -> None:
    assert adapter_for(version) == module


@pytest.mark.parametrize(
    "version", ["4.36.2", "4.56.2", "5.0.0", "5.4.0", "5.13.1", "5.24.0", "6.0"]
)
def test_any_other_release_is_named_with_what_to_install(version: str) -> None:
    with pytest.raises(VersionError, match=rf"transformers {re.escape(version)} is installed") as e:
        adapter_for(version)
    assert f'pip install "{REQUIREMENT}"' in str(e.value)
    assert "4.57, and 5.14 to 5.23" in str(e.value)
    assert ("a newer mnemon" in str(e.value)) == (release(version) > (5, 23))
    assert isinstance(e.value, DependencyError)


@pytest.mark.parametrize("version", ["", "five", "5", "main.1"])
def test_what_is_no_version_is_said_to_be_none(version: str) -> None:
    with pytest.raises(VersionError, match="no version number"):
        adapter_for(version)


def test_the_package_asks_for_the_same_releases() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert REQUIREMENT in project["dependencies"]
    for first, last, _ in ADAPTERS:
        assert first <= last
    lasts = [last for _, last, _ in ADAPTERS]
    assert lasts == sorted(lasts)


@pytest.mark.parametrize("use", ["mnemon.Cache", "mnemon.attach", "mnemon.load_cache"])
def test_the_message_comes_at_first_use(use: str) -> None:
    code = (
        "import transformers, mnemon\n"
        "transformers.__version__ = '5.7.0'\n"
        "for _ in range(2):\n"  # and again: nothing half imported stays behind
        "    try:\n"
        f"        {use}\n"
        "    except mnemon.errors.VersionError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("transformers 5.7.0 is installed, and this mnemon works with 4.57")


def test_without_transformers_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import mnemon\n"
        "try:\n    mnemon.hf\nexcept AttributeError:\n    pass\n"
        "try:\n    import mnemon.hf.versions\n"
        "except mnemon.errors.DependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert f'which is missing: pip install "{REQUIREMENT}"' in done.stdout


# -- adapters --------------------------------------------------------------------------------------


def test_the_adapter_is_chosen_once_and_nothing_else_asks_for_a_version() -> None:
    assert versions.current.__name__ == f"mnemon.hf.versions.{adapter_for(versions.installed)}"
    chosen = [name for name in sys.modules if re.fullmatch(r"mnemon\.hf\.versions\.v\d+_\d+", name)]
    assert versions.current.__name__ in chosen
    for path in SOURCES.rglob("*.py"):
        where = path.relative_to(SOURCES)
        if where.parts[:2] == ("hf", "versions") or where.parts[0] in ("legacy", "migrate"):
            continue
        text = path.read_text(encoding="utf-8")
        assert "transformers.__version__" not in text, where
        assert "hf.versions.v" not in text, where


def test_all_adapters_offer_the_same() -> None:
    offered = {path.stem: _exported(path) for path in FILES}
    assert set(offered) == {module for _, _, module in ADAPTERS}
    names = next(iter(offered.values()))
    assert all(other == names for other in offered.values())
    assert all(hasattr(versions.current, name) for name in names)
    for name in names:  # each is explained
        assert f"``{name}``" in str(versions.__doc__), name


def test_moving_names_are_imported_in_hf_only() -> None:
    """A name that one supported release spells otherwise is imported from mnemon.hf."""
    moving = {"PreTrainedConfig", "PretrainedConfig", "Cache", "EncoderDecoderCache"}
    for path in SOURCES.rglob("*.py"):
        where = path.relative_to(SOURCES)
        if where.parts[0] in ("hf", "legacy", "migrate"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert not moving & {alias.name for alias in node.names}, where
                # Whole rooms of transformers but its public top and its auto classes stay in hf.
                assert node.module in ("transformers", "transformers.models.auto"), where


def _exported(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise AssertionError(path)


# -- what a release's own models refuse ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # every modeling file is imported: their warnings are theirs
@pytest.mark.skipif(RELEASE >= (5, 0), reason="about transformers 4.57")
def test_models_with_caches_of_their_own_are_all_known() -> None:
    """transformers says itself which of its models take no common cache."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own = set()
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for cls in model if isinstance(model, tuple) else (model,):
            supports = getattr(cls, "_supports_default_dynamic_cache", None)
            if supports is not None and not supports():
                own.add(config.model_type)
    refused = {name for name in own if versions.current.why_not_served(_Named(name)) is not None}
    assert own == refused
    assert len(own) >= 12


class _Named:
    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


@pytest.mark.skipif(RELEASE >= (5, 0), reason="about transformers 4.57")
def test_they_are_refused_with_the_release_that_serves_them() -> None:
    config = CONFIG_MAPPING["mamba"]()
    with pytest.raises(NotServed, match=r"keeps its states in MambaCache.*>=5\.14"):
        mnemon.Cache(config)


@since(5, 14)
def test_nothing_is_refused_that_has_a_common_cache() -> None:
    assert layer_specs(CONFIG_MAPPING["mamba"](num_hidden_layers=2))


# -- what a release calls otherwise ----------------------------------------------------------------


def _cache() -> Any:
    cache = mnemon.Cache(LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2))
    for index in range(2):
        cache.update(torch.zeros(1, 2, 5, 8), torch.ones(1, 2, 5, 8), index)
    return cache


def test_mask_sizes_are_asked_for_in_the_words_of_the_release() -> None:
    cache = _cache()
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    if RELEASE < (5, 14):
        assert cache.get_mask_sizes(torch.arange(5, 8), 0) == (8, 0)


@pytest.mark.skipif(RELEASE >= (5, 0), reason="about transformers 4.57")
def test_the_older_names_are_there_in_the_older_release() -> None:
    cache = _cache()
    assert cache.get_max_cache_shape() == cache.max_cache_len == -1
    assert cache.max_batch_size == 1
    keys, values = cache[1]
    assert keys.shape == values.shape == (1, 2, 5, 8)
    assert [len(layer) for layer in cache] == [2, 2]


@pytest.mark.parametrize("num_new", [1, 3, 20])
def test_a_window_can_give_back_its_last_append(num_new: int) -> None:
    """What 4.57 needs, where nobody announces drafts; bounded all the same."""
    layer, plain = WindowLayer(6), WindowLayer(6)
    layer.record_last()
    whole = torch.randn(1, 2, 9 + num_new + 1, 4)
    for one in (layer, plain):
        one.append(whole[:, :, :9], whole[:, :, :9])
    layer.append(whole[:, :, 9 : 9 + num_new], whole[:, :, 9 : 9 + num_new])
    assert layer.can_crop(num_new)
    assert not layer.can_crop(num_new + 1)
    assert layer.num_stored <= 5 + num_new
    layer.crop(num_new)
    assert layer.num_stored == 5
    got, expected = (one.append(whole[:, :, 9:10], whole[:, :, 9:10]) for one in (layer, plain))
    assert torch.equal(got[0], expected[0])
    assert layer.num_stored <= 6
    assert layer.fork().can_crop(1)


def test_configs_have_one_name_here() -> None:
    assert isinstance(LlamaConfig(), PreTrainedConfig)
