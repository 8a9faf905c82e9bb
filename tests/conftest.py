"""Every test runs on one thread, and shapes are checked wherever layers are called."""

import os
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; read when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before anything imports mnemon.layers. What compiles does so in a process of its own (see
# test_compile.py): checked functions cannot be traced.
install_import_hook("mnemon.layers", "shape_checks.checked")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip what the installed transformers keeps to itself (Mamba's states in 4.57)."""
    from mnemon.errors import NotServed

    try:
        return (yield)
    except NotServed as error:
        pytest.skip(str(error))
