"""`cache[i]` -> the layer's keys and values; `cache[0][0].shape[2]` -> `cache.get_seq_length()`."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import Transform
from mnemon.migrate.rules.base import Rule, class_names, is_simple, parse, receiver_of
from mnemon.migrate.values import Sort, Value, has_sort, is_cache, without

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY = "cache[i]"
_PARTS = {0: "keys", 1: "values"}
_PARTS_OF_BOTH = {
    0: "self_attention_cache.layers.keys",
    1: "self_attention_cache.layers.values",
    2: "cross_attention_cache.layers.keys",
    3: "cross_attention_cache.layers.values",
}


@final
class Indexing(Rule):
    """Only of what is certainly a cache: tuples, dicts and lists are indexed the same way."""

    keys = (_KEY,)
    words = ("past_key", "past", "cache", "Cache")

    def subscript(self, flow: Flow, node: ast.Subscript, base: Value) -> None:
        if not flow.target.lacks(_KEY):
            return
        book = flow.book
        if not is_cache(base) or receiver_of(flow, node.value, base, "__getitem__") != "cache":
            self._doubt(flow, node, base)
            return
        inner = book.parent(node)
        is_double = "EncoderDecoderCache" in class_names(base)
        of_both = _part_of(inner, node, _PARTS_OF_BOTH)
        if is_double and of_both is not None and class_names(base) == {"EncoderDecoderCache"}:
            assert isinstance(inner, ast.Subscript)
            message = f"an entry of a layer's four -> `{of_both}`"
            if isinstance(inner.ctx, ast.Load) and not isinstance(node.slice, ast.Slice):
                book.rewrite(_KEY, node, inner, _entry(of_both), message)
        elif is_double:
            reason = "an EncoderDecoderCache gave four tensors: of its two inner caches"
            book.undecided(_KEY, node, reason)
        elif not isinstance(node.ctx, ast.Load):
            book.undecided(_KEY, node, "a cache never took a new layer this way")
        elif isinstance(node.slice, ast.Slice | ast.Tuple):
            book.undecided(_KEY, node, "several layers at once; take them from `cache.layers`")
        else:
            self._rewrite(flow, node)

    def _rewrite(self, flow: Flow, node: ast.Subscript) -> None:
        book = flow.book
        inner = book.parent(node)
        part = _part_of(inner, node, _PARTS)
        if part is not None and isinstance(inner, ast.Subscript):
            counted = _length_of(book.parent(inner), inner, book.parent)
            is_plain = isinstance(node.slice, ast.Name | ast.Constant | ast.Attribute)
            if counted is not None and is_plain and isinstance(inner.ctx, ast.Load):
                message = "the shape of a layer's entry -> `get_seq_length()`"
                book.rewrite(_KEY, node, counted, _length, message)
            elif isinstance(inner.ctx, ast.Load):
                message = f"`cache[i][{'01'[part == 'values']}]` -> `cache.layers[i].{part}`"
                book.rewrite(_KEY, node, inner, _entry(part), message)
            else:
                book.undecided(_KEY, node, "the tuple of a layer never took new tensors")
        elif isinstance(inner, ast.Attribute):
            book.undecided(_KEY, node, f"a layer's pair of keys and values has no `.{inner.attr}`")
        elif not is_simple(node.value) or not _is_index(node.slice):
            book.undecided(_KEY, node, "the layer is not a plain name; give it one")
        else:
            message = "`cache[i]` -> the layer's keys and values"
            parent = book.parent(node)
            bare = isinstance(parent, ast.Assign | ast.Return)
            book.rewrite(_KEY, node, node, _pair(bare=bare), message)

    def _doubt(self, flow: Flow, node: ast.Subscript, base: Value) -> None:
        """`past_key_values[0][0]` of something that may be a cache or a tuple."""
        known = without(base, Sort.NONE)
        is_named = has_sort(known, Sort.CACHE, Sort.CONVENTION) and not has_sort(
            known, Sort.OTHER, Sort.INSTANCE, Sort.UNKNOWN
        )
        if not is_named or not isinstance(node.ctx, ast.Load) or is_cache(base):
            return
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            return
        shown = ast.unparse(node.value)
        if shown.endswith("past_key_value") and isinstance(node.slice, ast.Constant | ast.Slice):
            return  # one layer's own pair: a cache would be asked for a layer by its number
        if flow.book.doubt(flow, node.value):
            return  # said once for a function
        flow.book.undecided(
            _KEY,
            node,
            f"`{shown}` may be a tuple here as well as a cache; where it is a cache, write "
            f"`{shown}.layers[i].keys`, or `{shown}.get_seq_length()` for its length",
        )


def _is_index(node: ast.expr) -> bool:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            return True
    return is_simple(node) or isinstance(node, ast.Constant)


def _part_of(inner: ast.AST | None, node: ast.expr, parts: dict[int, str]) -> str | None:
    match inner:
        case ast.Subscript(value=value, slice=ast.Constant(value=int() as at)) if value is node:
            return parts.get(at)
    return None


def _length_of(shape: object, inner: ast.expr, parent: object) -> ast.expr | None:
    """The whole of `cache[i][0].shape[2]` (or `.size(2)`), if that is what stands around it."""
    if not isinstance(shape, ast.Attribute) or shape.value is not inner:
        return None
    assert callable(parent)
    outer = parent(shape)
    match outer:
        case ast.Subscript(slice=at) if shape.attr == "shape" and _is_tokens(at):
            return outer
        case ast.Call(args=[at]) if shape.attr == "size" and _is_tokens(at):
            return outer
    return None


def _is_tokens(node: ast.expr) -> bool:
    """Axis 2 of [batch, heads, tokens, head_dim], from either end."""
    match node:
        case ast.Constant(value=2):
            return True
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=2)):
            return True
    return False


def _layer(node: cst.BaseExpression, *through: str) -> cst.Subscript:
    entry = cst.ensure_type(node, cst.Subscript)
    receiver = entry.value
    for name in through or ("layers",):
        receiver = cst.Attribute(receiver, cst.Name(name))
    return entry.with_changes(value=receiver)


def _entry(part: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        outer = cst.ensure_type(node, cst.Subscript)
        *through, last = part.split(".")
        layer = _layer(outer.value, *through)
        return cst.Attribute(layer, cst.Name(last), lpar=outer.lpar, rpar=outer.rpar)

    return transform


def _pair(*, bare: bool) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        layer = _layer(node).with_changes(lpar=[], rpar=[])
        template = "L.keys, L.values" if bare and not node.lpar else "(L.keys, L.values)"
        return parse(template, L=layer)

    return transform


def _length(node: cst.BaseExpression) -> cst.BaseExpression:
    if isinstance(node, cst.Subscript):
        shape = cst.ensure_type(node.value, cst.Attribute)
    else:
        shape = cst.ensure_type(cst.ensure_type(node, cst.Call).func, cst.Attribute)
    entry = cst.ensure_type(cst.ensure_type(shape.value, cst.Subscript).value, cst.Subscript)
    index = cst.ensure_type(entry.slice[0].slice, cst.Index).value
    first = isinstance(index, cst.Integer) and index.value == "0"
    template = "X.get_seq_length()" if first else "X.get_seq_length(I)"
    return parse(template, X=entry.value, I=index)
