"""Constructors whose arguments changed: StaticCache(config, batch, length), DynamicCache(n)."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import Transform
from mnemon.migrate.rules.base import Rule, is_pure
from mnemon.migrate.values import Atom, Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY, _LAYERS = "static_cache_arguments", "num_hidden_layers"
_OLD = ("config", "max_batch_size", "max_cache_len", "device", "dtype", "layer_device_map")
_KEPT = ("config", "max_cache_len", "offloading", "offload_only_non_sliding")
_DROPPED = ("max_batch_size", "batch_size", "device", "dtype", "layer_device_map", "tp_size")


@final
class Arguments(Rule):
    """Classes that are still there under the same name."""

    keys = (_KEY, _LAYERS)
    words = ("StaticCache", _LAYERS)

    def call(
        self,
        flow: Flow,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        if function == {Atom(Sort.CLASS, "StaticCache")} and "StaticCache" not in flow.classes:
            if flow.target.lacks(_KEY):
                self._static(flow, node)
        elif function == {Atom(Sort.CLASS, "DynamicCache")} and _LAYERS in keywords:
            if flow.target.lacks(_LAYERS) and "DynamicCache" not in flow.classes:
                message = "`DynamicCache(num_hidden_layers=n)` -> `DynamicCache()`"
                flow.book.rewrite(_LAYERS, node, node, _without({_LAYERS}), message)

    def _static(self, flow: Flow, node: ast.Call) -> None:
        found = static_arguments(node, offloading=False, was_static=True)
        if found is None:
            return
        if isinstance(found, str):
            flow.book.undecided(_KEY, node, found)
            return
        message = "batch, device and dtype are learned from the first update"
        flow.book.rewrite(_KEY, node, node, found, message)


def static_arguments(
    node: ast.Call, *, offloading: bool, was_static: bool
) -> Transform | str | None:
    """The arguments of a preallocated cache as they are written today.

    Args:
        node: the call.
        offloading: the class offloaded by itself.
        was_static: the call names StaticCache itself, so it may be a modern one.

    Returns:
        The change, the reason why it cannot be told, or None where nothing changes.
    """
    is_open = any(word.arg is None for word in node.keywords)
    if is_open and was_static and len(node.args) < 2:
        return None  # keywords of old are taken and passed over
    if is_open or any(isinstance(part, ast.Starred) for part in node.args):
        return "its arguments are not written out"
    words = {word.arg: word.value for word in node.keywords if word.arg is not None}
    names = _positional(node, words)
    if names is None:
        return "its second argument may be the batch or the length; name the arguments"
    values = dict(zip(names, node.args, strict=False)) | words
    length = values.get("max_cache_len")
    if length is None or (isinstance(length, ast.Constant) and length.value is None):
        if was_static and not set(values) & set(_DROPPED):
            return None
        return "it needs a length today: `max_cache_len=config.max_position_embeddings` was meant"
    unknown = set(values) - {*_KEPT, *_DROPPED, "offload_device"}
    if unknown:
        return f"its argument `{min(unknown)}` is not known"
    if "offload_device" in values and not _is_cpu(values["offload_device"]):
        return "it offloads to another device than the CPU, which cannot be asked for today"
    dropped = {name for name in values if name not in _KEPT}
    if not all(is_pure(values[name]) for name in dropped):
        return "an argument that is not needed today does more than give a value"
    if was_static and not dropped:
        return None
    return _static(names, dropped, offloading=offloading and "offloading" not in values)


def _positional(node: ast.Call, words: dict[str, ast.expr]) -> tuple[str, ...] | None:
    """What the positional arguments are: the second was the batch once, and is the length."""
    third = node.args[2] if len(node.args) > 2 else None
    if third is not None:
        is_flag = isinstance(third, ast.Constant) and isinstance(third.value, bool)
        return _KEPT if is_flag else _OLD
    if len(node.args) < 2:
        return _OLD
    if "max_cache_len" in words:
        return _OLD
    return None if set(words) & {"max_batch_size", "batch_size"} else _KEPT


def _is_cpu(node: ast.expr) -> bool:
    return ast.unparse(node) in {"'cpu'", "torch.device('cpu')"}


def _static(names: tuple[str, ...], dropped: set[str], *, offloading: bool) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(node, cst.Call)
        kept: list[cst.Arg] = []
        for at, argument in enumerate(call.args):
            name = names[at] if argument.keyword is None else argument.keyword.value
            if name in dropped:
                continue
            if argument.keyword is None and at > 0:
                argument = argument.with_changes(keyword=cst.Name(name), equal=_equal())
            kept.append(argument)
        return _closed(call, kept, offloading=offloading)

    return transform


def _closed(call: cst.Call, kept: list[cst.Arg], *, offloading: bool) -> cst.Call:
    last = call.args[-1]
    if offloading:
        word = cst.Arg(cst.Name("True"), keyword=cst.Name("offloading"), equal=_equal())
        if kept and isinstance(kept[-1].comma, cst.MaybeSentinel):
            space = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
            kept[-1] = kept[-1].with_changes(comma=space)
        kept.append(word)
    if kept:
        kept[-1] = kept[-1].with_changes(
            comma=last.comma, whitespace_after_arg=last.whitespace_after_arg
        )
    return call.with_changes(args=kept)


def _equal() -> cst.AssignEqual:
    none = cst.SimpleWhitespace("")
    return cst.AssignEqual(whitespace_before=none, whitespace_after=none)


def _without(names: set[str]) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(node, cst.Call)
        kept = [a for a in call.args if a.keyword is None or a.keyword.value not in names]
        return _closed(call, kept, offloading=False)

    return transform
