"""Compiles mnemon's Triton kernels for GPUs that need not be there: ptxas comes with Triton.

    python tests/attention/triton_targets.py [--all] [--capability 90]

Prints registers, stack and shared memory of each kernel. Not under TRITON_INTERPRET.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from mnemon.attention.triton import blocks, launch
from mnemon.attention.triton.combine import combine_splits
from mnemon.attention.triton.dense import dense_splits
from mnemon.attention.triton.packed import packed_splits
from mnemon.formats import Scheme

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
PLAIN = {"SOFTCAP": False, "CAUSAL": False, "WINDOW": False}
EVERYTHING = {"SOFTCAP": True, "CAUSAL": True, "WINDOW": True}
SPACE = {"partial": "*fp32", "tops": "*fp32", "totals": "*fp32"}
WORDS = {
    "key_words": "*i32", "value_words": "*i32", "key_scales": "*fp16", "value_scales": "*fp16",
    "key_factors": "*fp32", "value_factors": "*fp32",
}  # fmt: skip
MASKS = {"mask": "*u8", "bias": "*fp32", "lengths": "*i32", "starts": "*i32"}


def build(kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int) -> Any:
    """Compile one kernel. Integers are i32, optional tensors that are not named are None."""
    options = {"num_warps": 4, "enable_fp_fusion": True}
    options |= {name: constants[name] for name in OPTIONS if name in constants}
    signature, values, attributes = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(number,)] = "constexpr", constants[name]
        elif name in ("mask", "bias", "lengths", "starts", "table", "sinks", "lse"):
            signature[name] = types.get(name, "constexpr")
            if name not in types:
                values[(number,)] = None
        else:
            is_number = name in ("scale", "softcap")
            signature[name] = types.get(name, "fp32" if is_number else "i32")
        strided = re.fullmatch(r"(keys|values|key_factors|value_factors|blocks|x)_[bhtn]", name)
        if signature[name].startswith("*") or (strided and not name.endswith("factors_n")):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dense(
    capability: int, dtype: torch.dtype = torch.bfloat16, width: int = 128, rows: int = 4,
    page: int = 0, flags: dict[str, bool] = PLAIN,
) -> Any:  # fmt: skip
    constants = launch.dense_constants(dtype, width, width, rows, page) | flags
    pointer = POINTERS[dtype]
    types = {**SPACE, "query": pointer, "keys": pointer, "values": pointer}
    types |= {"table": "*i32"} if page else {}
    types |= MASKS if flags is EVERYTHING else {}
    return build(dense_splits, constants, types, capability)


def packed(
    capability: int, keys: Scheme, values: Scheme, dtype: torch.dtype = torch.bfloat16,
    width: int = 128, rows: int = 4, page: int = 0, flags: dict[str, bool] = PLAIN,
) -> Any:  # fmt: skip
    constants = launch.packed_constants(dtype, (keys, width), (values, width), rows, page) | flags
    types = {**SPACE, **WORDS, "query": "*fp32" if keys.rotated else POINTERS[dtype]}
    types |= {"table": "*i32"} if page else {}
    types |= MASKS if flags is EVERYTHING else {}
    return build(packed_splits, constants, types, capability)


def scheme(code: str, axis: str = "token", rotated: bool = False, group: int = 64) -> Scheme:
    return Scheme(code=code, axis=axis, group_size=group if axis == "token" else 0, rotated=rotated)


def packing(capability: int, code: str, axis: str, is_keys: bool, unpack: bool) -> Any:
    side = scheme(code, axis)
    constants = {
        "WIDTH": 128, "BITS": side.bits, "FP8": code == "fp8", "CHANNEL": axis == "channel",
        "GROUP": 128 if axis == "channel" else 64, "BLOCK_D": 128, "IS_KEYS": is_keys,
        "enable_fp_fusion": False,
    }  # fmt: skip
    types = {"x": "*bf16", "blocks": "*u8", "scales": "*fp16", "factors": "*fp32"}
    types |= {"wrong": "*i32", "out": "*bf16"}
    groups = {"GROUPS": 1 if axis == "channel" else 2, "BLOCK_G": constants["GROUP"]}
    if unpack:
        return build(blocks.unpack_block, constants, types, capability)
    return build(blocks.pack_block, constants | groups, types, capability)


def cases(everything: bool) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """What is compiled, by name."""
    int4 = scheme("int4", rotated=True), scheme("int4")
    yield "dense bf16 128", dense
    yield "dense, all options, paged", lambda cc: dense(cc, page=64, flags=EVERYTHING)
    yield "int4", lambda cc: packed(cc, *int4)
    yield "int4, all options, paged", lambda cc: packed(cc, *int4, page=4, flags=EVERYTHING)
    yield "int2 channels / int2", lambda cc: packed(cc, scheme("int2", "channel"), scheme("int2"))
    yield "int8", lambda cc: packed(cc, scheme("int8"), scheme("int8"))
    yield "fp8 / fp8 channels", lambda cc: packed(cc, scheme("fp8"), scheme("fp8", "channel"))
    yield "combine", lambda cc: build(
        combine_splits, {"VALUE_DIM": 128, "BLOCK_V": 128, "BLOCK_S": 32},
        {**SPACE, "out": "*bf16", "sinks": "*fp32", "lse": "*fp32"}, cc,
    )  # fmt: skip
    for unpack in (False, True):
        name = "unpack" if unpack else "pack"
        yield f"{name} int4 channels", lambda cc, u=unpack: packing(cc, "int4", "channel", True, u)
        yield f"{name} fp8", lambda cc, u=unpack: packing(cc, "fp8", "token", False, u)
    if not everything:
        return
    for dtype, width, rows in (
        (torch.bfloat16, 128, 32), (torch.bfloat16, 256, 8), (torch.bfloat16, 64, 1),
        (torch.float16, 80, 4), (torch.float32, 128, 4), (torch.float32, 256, 64),
    ):  # fmt: skip
        yield (
            f"dense {dtype} {width}, {rows} rows",
            lambda cc, d=dtype, w=width, r=rows: dense(cc, d, w, r),
        )
    for code in ("int8", "int4", "int2", "fp8"):
        for axes in (("channel", "token"), ("token", "channel")):
            sides = [scheme(code, axis) for axis in axes]
            yield f"{code} {' / '.join(axes)}", lambda cc, s=sides: packed(cc, *s)
        side = scheme(code)
        for width in (32, 64, 96, 256):
            own = scheme(code, group={32: 32, 96: 96}.get(width, 64))
            yield f"{code} {width}", lambda cc, s=own, w=width: packed(cc, s, s, width=w)
        yield f"{code} 64 rows", lambda cc, s=side: packed(cc, s, s, rows=64)
        yield f"{code} float32", lambda cc, s=side: packed(cc, s, s, torch.float32)
        for axis in ("token", "channel"):
            for is_keys, unpack in ((True, False), (True, True), (False, False), (False, True)):
                given = (code, axis, is_keys, unpack)
                yield f"packing {given}", lambda cc, g=given: packing(cc, *g)
    yield "int4 / int2", lambda cc: packed(cc, scheme("int4"), scheme("int2"))
    yield "int8 / int2", lambda cc: packed(cc, scheme("int8"), scheme("int2"))


def resources(made: Any) -> str:
    """Registers and stack by cuobjdump, shared memory by Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    used = f"{found[1]} registers, {found[2]} bytes of stack" if found else "registers unknown"
    return f"{used}, {made.metadata.shared} bytes shared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every combination, minutes")
    parser.add_argument("--capability", type=int, nargs="+", default=[90, 80])
    arguments = parser.parse_args()
    failed = 0
    for capability in arguments.capability:
        for name, make in cases(arguments.all):
            try:
                print(f"sm_{capability} {name}: {resources(make(capability))}", flush=True)
            except Exception as error:
                failed += 1
                print(f"sm_{capability} {name}: FAILED {str(error)[:400]}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
