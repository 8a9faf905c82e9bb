"""`cache.key_cache[i]` -> `cache.layers[i].keys`, and the other ways of using the two lists."""

from __future__ import annotations

import ast
from itertools import pairwise
from typing import TYPE_CHECKING, cast, final

import libcst as cst

from mnemon.migrate.edit import Transform
from mnemon.migrate.rules.base import (
    Receiver,
    Rule,
    class_names,
    parse,
    receiver_of,
    unknown_reason,
)
from mnemon.migrate.rules.names import layer_name
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow
    from mnemon.migrate.scope import ClassInfo

_PART = {"key_cache": "keys", "value_cache": "values"}
_READERS = {"enumerate", "list", "tuple", "zip", "reversed", "sorted", "any", "all", "sum", "map"}
_READERS |= {"stack", "cat", "concat", "iter", "filter", "max", "min"}


@final
class Lists(Rule):
    """Reading and writing entries, going through them, counting them."""

    keys = ("key_cache", "value_cache")
    attributes = frozenset(keys)
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        key, book = node.attr, flow.book
        receiver = receiver_of(flow, node.value, base, key)
        if not flow.target.lacks(key) or receiver is Receiver.OTHER:
            return
        if receiver is Receiver.MAYBE:
            book.undecided(key, node, unknown_reason(node.value, base))
            return
        owner = flow.scope.owner
        if owner is not None and ast.unparse(node.value) == "self" and _keeps_lists(owner):
            book.undecided(
                key,
                node,
                f"`{owner.name}` fills this list itself: make it in `__init__`, which no base "
                f"class does today (`self.{key} = []`), or move to `layers` as a whole",
            )
            return
        part = _PART[key]
        parent = book.parent(node)
        match parent:
            case ast.Subscript() if parent.value is node:
                self._entry(flow, node, parent, part)
            case ast.Assign(targets=[_], value=ast.ListComp() as made) if _is_of_each(node, made):
                book.replace_statement(
                    key,
                    parent,
                    _each(node, made, part, layer_name(parent)),
                    f"every entry of `{key}` is set anew -> a loop over `layers`",
                )
            case _ if not isinstance(node.ctx, ast.Load):
                book.undecided(key, node, "the list itself is replaced here; it lives in `layers`")
            case ast.Call(func=ast.Name(id="len")):
                self._count(flow, node, parent, base)
            case ast.Call(func=ast.Name(id="zip"), args=[first, second]) if _pair(first, second):
                if first is node:
                    name = layer_name(node)
                    message = "the two lists -> `cache.layers`, one after the other"
                    book.rewrite(key, node, parent, _zipped(name), message)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if (
                name in _READERS and any(argument is node for argument in parent.args)
            ):
                self._all(flow, node, part)
            case ast.comprehension() if book.is_replaced(parent):
                return
            case ast.Attribute(attr="append") if self._is_appending(flow, node):
                return
            case ast.For() | ast.AsyncFor() | ast.comprehension() if parent.iter is node:
                self._all(flow, node, part)
            case ast.If() | ast.While() | ast.IfExp() if parent.test is node:
                self._truth(flow, node, base)
            case ast.UnaryOp(op=ast.Not()) | ast.BoolOp():
                self._truth(flow, node, base)
            case ast.Attribute():
                book.undecided(
                    key, node, f"`.{parent.attr}` changes the list itself; layers are no lists"
                )
            case _:
                book.undecided(key, node, "the list itself is handed on here; layers are no lists")

    def _entry(self, flow: Flow, node: ast.Attribute, entry: ast.Subscript, part: str) -> None:
        key, book = node.attr, flow.book
        if isinstance(entry.ctx, ast.Del):
            book.undecided(key, node, "an entry is deleted here; layers stay")
        elif isinstance(entry.slice, ast.Tuple):
            return
        elif not isinstance(entry.slice, ast.Slice):
            message = f"`{key}[i]` -> `layers[i].{part}`"
            book.rewrite(key, node, entry, _indexed(part), message)
        elif isinstance(entry.ctx, ast.Load):
            message = f"`{key}[a:b]` -> a list of the layers' {part}"
            book.rewrite(key, node, entry, _sliced(part, layer_name(entry)), message)
        else:
            book.undecided(key, node, "several entries are set at once here")

    def _is_appending(self, flow: Flow, node: ast.Attribute) -> bool:
        """`x.key_cache.append(k)` and `x.value_cache.append(v)`, one after the other."""
        book = flow.book
        statements = book.neighbours(node)
        found = [_appended(statement) for statement in statements]
        for at, (first, second) in enumerate(pairwise(found)):
            if first is None or second is None or first[:2] != (second[0], "key_cache"):
                continue
            if second[1] != "value_cache" or not {id(first[3]), id(second[3])} & {id(node)}:
                continue
            function = flow.scope.function
            if function is not None and function.node.name == "update":
                return False  # it would call itself
            if first[3] is node:
                name = layer_name(statements[at])
                text = (
                    f"{first[0]}.update({first[2]}, {second[2]}, "
                    f"sum({name}.is_initialized for {name} in {first[0]}.layers))"
                )
                message = "appending to both lists -> `update` of the next layer"
                book.replace_statement("key_cache", statements[at], (text,), message)
                book.replace_statement("value_cache", statements[at + 1], (), message)
            return True
        return False

    def _all(self, flow: Flow, node: ast.Attribute, part: str) -> None:
        message = f"`{node.attr}` -> a list of the layers' {part}"
        flow.book.rewrite(node.attr, node, node, _listed(part, layer_name(node)), message)

    def _count(self, flow: Flow, node: ast.Attribute, call: ast.Call, base: Value) -> None:
        key, book = node.attr, flow.book
        is_static = class_names(base) == {"StaticCache"}
        tests = ast.Compare | ast.BoolOp | ast.UnaryOp | ast.If | ast.While | ast.IfExp
        if isinstance(book.parent(call), tests) and not is_static:
            # The old list held the layers that had been filled; layers made from a config are
            # there before that.
            name = layer_name(node)
            message = f"`len({key})` -> how many layers hold something"
            template = f"sum({name}.is_initialized for {name} in X.layers)"
            book.rewrite(key, node, call, _counted(template), message)
        else:
            book.rewrite(key, node, node, _layers, f"`len({key})` -> `len(layers)`")

    def _truth(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        key, book = node.attr, flow.book
        if class_names(base) == {"StaticCache"}:
            book.undecided(key, node, "the list of a StaticCache was never empty")
        else:
            book.rewrite(key, node, node, _length, f"`{key}` as a test -> `get_seq_length()`")


def _keeps_lists(owner: ClassInfo) -> bool:
    """Whether a cache's own `update` appends to its lists: half of that moved would be worse."""
    update = owner.methods.get("update")
    return update is not None and any(
        isinstance(node, ast.Attribute)
        and node.attr == "append"
        and ast.unparse(node.value) in {f"self.{name}" for name in _PART}
        for node in ast.walk(update.node)
    )


def _pair(first: ast.expr, second: ast.expr) -> bool:
    return (
        isinstance(first, ast.Attribute)
        and isinstance(second, ast.Attribute)
        and (first.attr, second.attr) == ("key_cache", "value_cache")
        and ast.dump(first.value) == ast.dump(second.value)
    )


def _appended(statement: ast.stmt) -> tuple[str, str, str, ast.Attribute] | None:
    """(receiver, list, what, the list's node) of `receiver.list.append(what)`."""
    match statement:
        case ast.Expr(
            value=ast.Call(
                func=ast.Attribute(value=ast.Attribute() as held, attr="append"),
                args=[ast.Name() | ast.Attribute() as added],
                keywords=[],
            )
        ) if held.attr in _PART:
            return ast.unparse(held.value), held.attr, ast.unparse(added), held
    return None


def _is_of_each(node: ast.Attribute, made: ast.ListComp) -> bool:
    """`x.key_cache = [f(t) for t in x.key_cache]`."""
    generator = made.generators[0]
    return (
        len(made.generators) == 1
        and not generator.ifs
        and isinstance(generator.target, ast.Name)
        and ast.unparse(generator.iter) == ast.unparse(node)
    )


def _each(node: ast.Attribute, made: ast.ListComp, part: str, name: str) -> tuple[str, ...]:
    target = cast(ast.Name, made.generators[0].target).id
    entry = cst.parse_expression(f"{name}.{part}")
    value = parse(ast.unparse(made.elt), **{target: entry})
    shown = cst.Module([]).code_for_node(value)
    return (f"for {name} in {ast.unparse(node.value)}.layers:", f"    {name}.{part} = {shown}")


def _layers(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.with_changes(attr=cst.Name("layers"))


def _length(node: cst.BaseExpression) -> cst.BaseExpression:
    return parse("X.get_seq_length()", X=cst.ensure_type(node, cst.Attribute).value)


def _indexed(part: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        entry = cst.ensure_type(node, cst.Subscript)
        layer = entry.with_changes(value=_layers(entry.value), lpar=[], rpar=[])
        return cst.Attribute(layer, cst.Name(part), lpar=entry.lpar, rpar=entry.rpar)

    return transform


def _sliced(part: str, name: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        entry = cst.ensure_type(node, cst.Subscript)
        layers = entry.with_changes(value=_layers(entry.value))
        return parse(f"[{name}.{part} for {name} in X]", X=layers)

    return transform


def _listed(part: str, name: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        receiver = cst.ensure_type(node, cst.Attribute).value
        return parse(f"[{name}.{part} for {name} in X.layers]", X=receiver)

    return transform


def _receiver(node: cst.BaseExpression) -> cst.BaseExpression:
    """Of the first argument of a call."""
    return cst.ensure_type(cast(cst.Call, node).args[0].value, cst.Attribute).value


def _counted(template: str) -> Transform:
    return lambda node: parse(template, X=_receiver(node))


def _zipped(name: str) -> Transform:
    template = f"(({name}.keys, {name}.values) for {name} in X.layers)"
    return lambda node: parse(template, X=_receiver(node))
