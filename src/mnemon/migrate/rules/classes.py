"""Cache classes that are gone: constructors, isinstance, annotations; their imports follow."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple, final

import libcst as cst

from mnemon.migrate.edit import Transform, loosest
from mnemon.migrate.rules.arguments import static_arguments
from mnemon.migrate.rules.base import Rule, is_simple, parse
from mnemon.migrate.values import Atom, Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow


class _Successor(NamedTuple):
    """What stands for a class today, and how its objects are told from others of that class."""

    name: str
    test: str = ""
    offloading: bool = False
    backend: str = ""


_SUCCESSORS = {
    "HybridCache": _Successor("StaticCache", "any(X.is_sliding)"),
    "HybridChunkedCache": _Successor("StaticCache", "any(X.is_sliding)"),
    "SlidingWindowCache": _Successor("StaticCache", "any(X.is_sliding)"),
    "OffloadedStaticCache": _Successor("StaticCache", "X.offloading", offloading=True),
    "OffloadedHybridCache": _Successor("StaticCache", "X.offloading", offloading=True),
    "OffloadedCache": _Successor("DynamicCache", "X.offloading", offloading=True),
    "QuantoQuantizedCache": _Successor("QuantizedCache", backend="quanto"),
    "HQQQuantizedCache": _Successor("QuantizedCache", backend="hqq"),
}
_WITHOUT = ("SinkCache", "MambaCache", "QuantizedCacheConfig", "CacheConfig")


@final
class Classes(Rule):
    """Every mention of a class that the target lacks is rewritten or reported."""

    keys = (*_SUCCESSORS, *_WITHOUT)
    words = keys

    def name(self, flow: Flow, node: ast.Name | ast.Attribute, value: Value) -> None:
        gone = gone_class(flow, value)
        if gone is None or _is_guarded(flow, node):
            return
        book = flow.book
        book.class_uses[id(node)] = (node, gone)
        parent = book.parent(node)
        if isinstance(parent, ast.Call) and parent.func is node:
            return  # `call` has the arguments
        successor = _SUCCESSORS.get(gone)
        test = _isinstance_of(flow, node)
        if test is not None:
            self._test(flow, node, test, gone, successor)
        elif successor is not None and _is_annotation(flow, node):
            self._rename(flow, node, node, gone, successor.name, _renaming(flow, successor.name))
        else:
            book.undecided(gone, node, self._advice(gone, flow))

    def call(
        self,
        flow: Flow,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        gone = gone_class(flow, function)
        if gone is None or _is_guarded(flow, node.func):
            return
        successor = _SUCCESSORS.get(gone)
        if successor is None:
            flow.book.undecided(gone, node, self._advice(gone, flow))
            return
        found = self._arguments(node, successor, gone, arguments)
        if isinstance(found, str):
            flow.book.undecided(gone, node, found)
            return
        new = _bound_as(flow, successor.name)
        if new is None:
            flow.book.undecided(gone, node, f"`{successor.name}` is something else in this file")
            return

        def transform(call: cst.BaseExpression) -> cst.BaseExpression:
            changed = cst.ensure_type(found(call), cst.Call)
            return changed.with_changes(func=_named(changed.func, new, successor.name))

        self._rename(flow, node.func, node, gone, successor.name, transform)

    def _arguments(
        self, node: ast.Call, successor: _Successor, gone: str, arguments: list[Value]
    ) -> Transform | str:
        """How the arguments change, or why that cannot be told."""
        if successor.name == "StaticCache":
            found = static_arguments(node, offloading=successor.offloading, was_static=False)
            return found or (lambda call: call)
        if successor.name == "DynamicCache":
            if node.args or node.keywords:
                return "it took no arguments"
            return lambda call: call.with_changes(
                args=cst.ensure_type(cst.parse_expression("f(offloading=True)"), cst.Call).args
            )
        first = node.args[0] if node.args else None
        is_config = first is not None and "cache_config" in ast.unparse(first)
        made = bool(arguments) and any("CacheConfig" in atom.name for atom in arguments[0])
        named = any(word.arg in ("cache_config", None) for word in node.keywords)
        if is_config or made or named or any(isinstance(a, ast.Starred) for a in node.args):
            return (
                f"{gone} took a config of its own; write `QuantizedCache(backend="
                f'"{successor.backend}", config=model.config, nbits=...)`'
            )
        backend = cst.Arg(cst.SimpleString(f'"{successor.backend}"'))
        return lambda call: call.with_changes(args=[backend, *cst.ensure_type(call, cst.Call).args])

    def _test(
        self,
        flow: Flow,
        node: ast.Name | ast.Attribute,
        test: ast.Call,
        gone: str,
        successor: _Successor | None,
    ) -> None:
        subject, classes = test.args
        book = flow.book
        if isinstance(classes, ast.Tuple):
            kept = {ast.unparse(found).rpartition(".")[2] for found in classes.elts}
            if successor is None or successor.name in kept:
                message = f"`{gone}` left out of isinstance"
                self._rename(flow, node, classes, gone, "", _left_out(ast.unparse(node)), message)
                return
        elif successor is not None and successor.test and is_simple(subject):
            new = _bound_as(flow, successor.name)
            if new is not None:
                transform = _tested(new, successor)
                message = f"isinstance of `{gone}` -> of `{successor.name}`, and what it was"
                self._rename(
                    flow,
                    node,
                    test,
                    gone,
                    successor.name,
                    transform,
                    message,
                    loose=not loosest(test, book.parent(test)),
                )
                return
        book.undecided(gone, node, self._advice(gone, flow))

    def _rename(
        self,
        flow: Flow,
        node: ast.expr,
        edited: ast.expr,
        gone: str,
        needs: str,
        transform: Transform | None,
        message: str = "",
        *,
        loose: bool = False,
    ) -> None:
        if transform is None:
            flow.book.undecided(gone, node, f"`{needs}` is something else in this file")
            return
        flow.book.handled[id(node)] = needs
        flow.book.rewrite(
            gone,
            node,
            edited,
            transform,
            message or f"`{gone}` -> `{needs}`",
            loose=loose,
        )

    def _advice(self, gone: str, flow: Flow) -> str:
        return f"`{gone}` is not in transformers {flow.target.version}; write `{self.modern(gone)}`"


def gone_class(flow: Flow, value: Value) -> str | None:
    """The class of transformers that `value` certainly is, if the target lacks it."""
    if len(value) != 1:
        return None
    atom: Atom = next(iter(value))
    name = atom.name.removeprefix("transformers.")
    if atom.sort is not Sort.CLASS or name in flow.classes or name not in Classes.keys:
        return None
    # Since 5.6 this name is StaticCache itself: importable from one module, and another meaning.
    is_alias = name == "SlidingWindowCache" and flow.target.at_least("5.0")
    return name if is_alias or flow.target.lacks(name) else None


def _is_guarded(flow: Flow, node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in flow.book.guarded_names


def _isinstance_of(flow: Flow, node: ast.expr) -> ast.Call | None:
    """The isinstance or issubclass that names this class."""
    parent = flow.book.parent(node)
    inner: ast.AST = node
    if isinstance(parent, ast.Tuple):
        inner, parent = parent, flow.book.parent(parent)
    match parent:
        case ast.Call(func=ast.Name(id="isinstance"), args=[_, classes]) if classes is inner:
            return parent
    return None


def _is_annotation(flow: Flow, node: ast.AST) -> bool:
    inner = node
    for ancestor in flow.book.ancestors(node):
        match ancestor:
            case ast.arg() | ast.AnnAssign():
                return ancestor.annotation is inner
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return ancestor.returns is inner
            case ast.expr():
                inner = ancestor
            case _:
                return False
    return False


def _bound_as(flow: Flow, name: str) -> str | None:
    """What the class `name` is called in this file; None if that name is taken."""
    wanted: Value = frozenset({Atom(Sort.CLASS, name)})
    if flow.look_up(name) == wanted:
        return name
    for bound, value in flow.module.every.items():
        if value == wanted:
            return bound
    is_free = name not in flow.module.every and name not in flow.scope.local
    return name if is_free else None


def _named(node: cst.BaseExpression, bound: str, name: str) -> cst.BaseExpression:
    if isinstance(node, cst.Attribute):
        return node.with_changes(attr=cst.Name(name))
    return cst.Name(bound)


def _renaming(flow: Flow, name: str) -> Transform | None:
    bound = _bound_as(flow, name)
    return None if bound is None else lambda node: _named(node, bound, name)


def _left_out(shown: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        if not isinstance(node, cst.Tuple):
            return node
        kept = [part for part in node.elements if cst.Module([]).code_for_node(part.value) != shown]
        if len(kept) == 1:
            return kept[0].value
        if kept:
            kept[-1] = kept[-1].with_changes(comma=node.elements[-1].comma)
        return node.with_changes(elements=kept)

    return transform


def _tested(bound: str, successor: _Successor) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(node, cst.Call)
        named = _named(call.args[1].value, bound, successor.name)
        return parse(f"isinstance(X, C) and {successor.test}", X=call.args[0].value, C=named)

    return transform
