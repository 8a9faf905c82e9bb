"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import mnemon
import mnemon.errors


def test_public_names() -> None:
    assert mnemon.__all__ == [
        "Cache", "Recipe", "attach", "detach", "diffusion", "errors", "export_model", "legacy",
        "load_cache", "load_export", "memory", "prefill",
    ]  # fmt: skip
    for name in mnemon.__all__:
        assert getattr(mnemon, name) is not None
        assert name in dir(mnemon)
    assert isinstance(mnemon.__version__, str)


def test_a_wrong_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="load_cache"):
        mnemon.loadcache  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        "import mnemon",
        "import mnemon.errors",
        "import mnemon; mnemon.legacy.enable",
        "import mnemon.recipe; mnemon.recipe.parse('static(4)')",
        "from mnemon import Recipe, errors",
        "import mnemon.planner",
    ],
)
def test_light_imports_leave_torch_alone(statement: str) -> None:
    code = (
        f"{statement}\nimport sys\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
