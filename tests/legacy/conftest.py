"""Old models, built once; the shim's own warnings are looked at in test_warnings only."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mnemon

from .building import STYLES, build, load
from .record import RECORDED

NATIVE = frozenset(
    style for style, spec in STYLES.items() if spec.native == transformers.__version__
)
"""Styles that the installed release runs without help."""

# What transformers itself warns of when old code uses what is still there.
QUIET = (
    "ignore:The attention mask API under:FutureWarning",
    "ignore:`rope_scaling` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for entry in QUIET:
                item.add_marker(pytest.mark.filterwarnings(entry))
            if item.path.name != "test_warnings.py":
                item.add_marker(pytest.mark.filterwarnings("ignore::mnemon.legacy.LegacyWarning"))


@pytest.fixture(scope="session", autouse=True)
def modules_of_remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of remote code go to a folder of this run."""
    from transformers import dynamic_module_utils

    folder = str(tmp_path_factory.mktemp("modules"))
    before = dynamic_module_utils.HF_MODULES_CACHE
    offline = os.environ.get("HF_HUB_OFFLINE")
    dynamic_module_utils.HF_MODULES_CACHE = folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    dynamic_module_utils.HF_MODULES_CACHE = before
    if offline is None:
        del os.environ["HF_HUB_OFFLINE"]


@pytest.fixture(scope="session")
def old_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The model of a style, loaded with the shim on."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(style: str) -> Any:
        if style not in made:
            with mnemon.legacy.enable():
                made[style] = load(build(style, folder), STYLES[style].auto_class)
        return made[style]

    return get


@pytest.fixture(scope="session")
def recorded() -> dict[str, dict[str, Any]]:
    """What the styles said, by release."""
    answers: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text())
    return answers


@pytest.fixture
def enabled() -> Iterator[None]:
    """The shim, on for one test."""
    with mnemon.legacy.enable():
        yield


def pairs(num_layers: int = 2, tokens: int = 5, **kwargs: Any) -> tuple[Any, ...]:
    """A past in the old form, of numbers that differ everywhere."""
    torch.manual_seed(0)
    shape = (kwargs.get("batch", 1), kwargs.get("heads", 2), tokens, kwargs.get("width", 4))
    return tuple((torch.randn(shape), torch.randn(shape)) for _ in range(num_layers))
