"""Every test runs on one thread, and shapes are checked wherever layers are called."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

# Before anything imports mnemon.layers. What compiles does so in a process of its own (see
# test_compile.py): checked functions cannot be traced.
install_import_hook("mnemon.layers", "shape_checks.checked")
