"""`for k, v in cache` -> over `cache.layers`; since 5.0 a cache gives three things a layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast, final

import libcst as cst

from mnemon.migrate.edit import Transform
from mnemon.migrate.rules.base import Rule, class_names, parse, receiver_of
from mnemon.migrate.rules.names import layer_name, rest_name
from mnemon.migrate.values import Sort, Value, has_sort, is_cache, is_named_cache, without

if TYPE_CHECKING:
    from mnemon.migrate.book import Book
    from mnemon.migrate.flow import Flow

_KEY = "iteration"
_DOUBT = (
    "since 5.0 this gives (keys, values, window) of every layer, before that (keys, values); "
    "nothing in this file tells which of them the code expects"
)


@final
class Iteration(Rule):
    """Loops and comprehensions; a tuple of pairs, which it may also be, must go on working."""

    keys = (_KEY,)
    words = ("past_key", "past", "cache", "Cache")

    def iteration(
        self,
        flow: Flow,
        iterated: ast.expr,
        target: ast.expr | None,
        body: Sequence[ast.AST],
        value: Value,
    ) -> None:
        known = without(value, Sort.NONE)
        if not flow.target.lacks(_KEY) or not has_sort(known, Sort.CACHE, Sort.CONVENTION):
            return
        if not is_named_cache(known) or not flow.imports.uses_transformers:
            return
        if receiver_of(flow, iterated, known, "__iter__") != "cache":
            return
        if "EncoderDecoderCache" in class_names(known):
            reason = "an EncoderDecoderCache gives six things for every layer since 5.0, not four"
            flow.book.undecided(_KEY, iterated, reason)
            return
        is_sure = is_cache(known)
        if target is None:
            self._reader(flow, iterated, body[0], is_sure)
        else:
            self._loop(flow, iterated, target, body, is_sure)

    def _reader(self, flow: Flow, iterated: ast.expr, call: ast.AST, is_sure: bool) -> None:
        """`list(cache)`, `enumerate(cache)`: where a loop unpacks it, the loop's target tells."""
        target, body = _target_of(flow.book, iterated, cast(ast.Call, call))
        if target is not None:
            self._loop(flow, iterated, target, body, is_sure)
        elif is_sure:
            message = "going through the cache -> through `cache.layers`"
            transform = _pairs(layer_name(iterated), bare=_is_only_argument(flow.book, iterated))
            flow.book.rewrite(_KEY, iterated, iterated, transform, message, if_old=_DOUBT)

    def _loop(
        self,
        flow: Flow,
        iterated: ast.expr,
        target: ast.expr,
        body: Sequence[ast.AST],
        is_sure: bool,
    ) -> None:
        book = flow.book
        if isinstance(target, ast.Tuple | ast.List):
            if len(target.elts) != 2 or any(isinstance(t, ast.Starred) for t in target.elts):
                return
            if is_sure:
                message = "going through the cache -> through `cache.layers`"
                bare = _is_only_argument(book, iterated)
                transform = _pairs(layer_name(iterated), bare=bare)
                book.rewrite(_KEY, iterated, iterated, transform, message)
            else:
                name = rest_name([*body, target, iterated])
                message = "a third thing for every layer since 5.0 is left aside"
                book.rewrite(_KEY, iterated, target, _starred(name), message)
        elif isinstance(target, ast.Name) and not _is_indexed_only(target.id, body):
            name = target.id
            transform = _pairs(layer_name(iterated)) if is_sure else _first_two(name)
            message = "the pairs of a cache, without what came third in 5.0"
            if is_sure:
                book.rewrite(_KEY, iterated, iterated, transform, message, if_old=_DOUBT)
            elif _is_reordering(flow, name, body):
                book.rewrite(_KEY, iterated, iterated, transform, message)
            elif not book.doubt(flow, iterated):
                shown = ast.unparse(iterated)
                reason = f"`{shown}` may be a tuple here as well as a cache: {_DOUBT}"
                book.undecided(_KEY, iterated, reason)


def _target_of(
    book: Book, iterated: ast.expr, call: ast.Call
) -> tuple[ast.expr | None, Sequence[ast.AST]]:
    """The target that takes the cache's part of `for i, (k, v) in enumerate(cache)`."""
    if not isinstance(call.func, ast.Name) or call.func.id not in {"enumerate", "zip", "reversed"}:
        return None, ()
    loop = book.parent(call)
    if not isinstance(loop, ast.For | ast.AsyncFor | ast.comprehension) or loop.iter is not call:
        return None, ()
    body: list[ast.AST] = list(loop.body) if not isinstance(loop, ast.comprehension) else []
    if isinstance(loop, ast.comprehension) and (around := book.parent(loop)) is not None:
        body = [around]
    if call.func.id == "reversed":
        return loop.target, body
    at = 1 if call.func.id == "enumerate" else call.args.index(iterated)
    if isinstance(loop.target, ast.Tuple) and len(loop.target.elts) > at:
        return loop.target.elts[at], body
    return None, ()


def _is_indexed_only(name: str, body: Sequence[ast.AST]) -> bool:
    """Whether only `name[0]` and the like are used, which mean the same in pairs and threes."""
    return all(is_indexed for is_indexed in _uses(name, body))


def _is_reordering(flow: Flow, name: str, body: Sequence[ast.AST]) -> bool:
    """Whether this is the loop of `_reorder_cache` over the tensors of every layer.

    generate hands that function whatever the model returned. Encoder-decoder models have four
    tensors for every layer, which must all stay.
    """
    function = flow.scope.function
    if function is None or function.node.name != "_reorder_cache":
        return False
    if flow.book.is_encoder_decoder:
        return False
    return any(
        isinstance(part, ast.comprehension) and _is_named(part.iter, name)
        for node in body
        for part in ast.walk(node)
    )


def _uses(name: str, body: Sequence[ast.AST]) -> Iterator[bool]:
    indexed: set[int] = set()
    for node in body:
        for part in ast.walk(node):
            if isinstance(part, ast.Subscript) and _is_named(part.value, name):
                if isinstance(part.slice, ast.Constant | ast.Slice):
                    indexed.add(id(part.value))
            elif isinstance(part, ast.Assign) and _is_named(part.value, name):
                if any(_is_three(target) for target in part.targets):
                    indexed.add(id(part.value))
            elif isinstance(part, ast.Name) and part.id == name:
                if isinstance(part.ctx, ast.Load):
                    yield id(part) in indexed


def _is_named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_three(target: ast.expr) -> bool:
    return isinstance(target, ast.Tuple) and (
        len(target.elts) > 2 or any(isinstance(part, ast.Starred) for part in target.elts)
    )


def _is_only_argument(book: Book, node: ast.expr) -> bool:
    """Whether a generator needs no parentheses of its own in the place of `node`."""
    call = book.parent(node)
    return isinstance(call, ast.Call) and call.args == [node] and not call.keywords


def _pairs(name: str, *, bare: bool = False) -> Transform:
    template = f"(({name}.keys, {name}.values) for {name} in X.layers)"

    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        found = parse(template, X=node)
        return found.with_changes(lpar=[], rpar=[]) if bare else found

    return transform


def _first_two(name: str) -> Transform:
    template = f"({name}[:2] for {name} in X)"
    return lambda node: parse(template, X=node)


def _starred(name: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        target = cast(cst.Tuple, node)
        space = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        first, second = target.elements
        rest = cst.StarredElement(cst.Name(name), comma=second.comma)
        return target.with_changes(elements=[first, second.with_changes(comma=space), rest])

    return transform
