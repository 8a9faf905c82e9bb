"""Follow a file statement by statement, knowing at each point what every name may be.

Two rounds over the tree: the first gathers what functions return, what they are called with and
what `self.x` holds; the second tells the rules.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mnemon.migrate import calls, expressions, narrow, typed
from mnemon.migrate.imports import CACHE_CLASSES, LAYER_CLASSES, MODEL_CLASSES, Imports
from mnemon.migrate.scope import ClassInfo, FunctionInfo, Scope, bound_names, path_of
from mnemon.migrate.target import Target
from mnemon.migrate.values import (
    CONVENTION,
    CONVENTIONAL,
    LEGACY,
    NONE,
    NOTHING,
    OTHER,
    STALE,
    UNKNOWN,
    Atom,
    Sort,
    Value,
    has_sort,
    is_cache,
    without,
)

if TYPE_CHECKING:
    from mnemon.migrate.book import Book

__all__ = ["Flow"]

_ATTRIBUTE_HANDLERS = {"AttributeError"}
_IMPORT_HANDLERS = {"ImportError", "ModuleNotFoundError", "Exception", ""}


@final
@dataclass(slots=True, eq=False)
class _Body:
    """A function body that is looked at once everything around it is known."""

    info: FunctionInfo
    scope: Scope


@final
class Flow:
    """One file: its imports, classes and functions, and the place the reading has reached."""

    def __init__(self, tree: ast.Module, target: Target, book: Book) -> None:
        self.tree = tree
        self.target = target
        self.book = book
        self.imports = Imports(book.nodes)
        self.classes: dict[str, ClassInfo] = {}
        self.functions: dict[int, FunctionInfo] = {}
        self.class_infos: dict[int, ClassInfo] = {}
        self.global_values: dict[str, Value] = {}
        self.foreign: set[str] = set()  # attributes that classes of this file define themselves
        self.telling = False
        self.open_guards: set[int] = set()
        self.expecting_attribute_error = 0
        self.expecting_import_error = 0
        self.scope = Scope(None)
        self.module = self.scope
        self._bodies: list[_Body] = []

    def run(self) -> None:
        """Both rounds."""
        for telling in (False, True):
            self.telling = telling
            self.scope = self.module = Scope(None, every=dict(self.global_values))
            self._bodies = []
            self.block(self.tree.body)
            while self._bodies:
                body = self._bodies.pop(0)
                self._function_body(body)

    def infer(self, node: ast.expr) -> Value:
        """What `node` may be here; the rules are told of what is used in it."""
        return expressions.infer(self, node)

    def peek(self, node: ast.expr) -> Value:
        """`infer` without telling the rules."""
        telling, self.telling = self.telling, False
        try:
            return expressions.infer(self, node)
        finally:
            self.telling = telling

    # What the rules are told.

    def tell_name(self, node: ast.Name | ast.Attribute, value: Value) -> None:
        self.book.name(self, node, value)

    def tell_attribute(self, node: ast.Attribute, base: Value) -> None:
        self.book.attribute(self, node, base)

    def tell_subscript(self, node: ast.Subscript, base: Value) -> None:
        self.book.subscript(self, node, base)

    def tell_call(
        self,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        self.book.call(self, node, function, arguments, keywords)

    def tell_iteration(
        self,
        iterated: ast.expr,
        target: ast.expr | None,
        body: Sequence[ast.AST],
        value: Value,
    ) -> None:
        self.book.iteration(self, iterated, target, body, value)

    # Names.

    def look_up(self, name: str) -> Value:
        """What `name` may be here."""
        scope: Scope | None = self.scope
        assert scope is not None
        if name in scope.env:
            return scope.env[name]
        if scope.function is not None and name in scope.local:
            return UNKNOWN
        scope = scope.parent
        while scope is not None:
            if not scope.is_class and name in scope.every:
                return scope.every[name]
            scope = scope.parent
        return UNKNOWN

    def path(self, node: ast.AST) -> str | None:
        return path_of(node)

    def set_path(self, path: str, value: Value) -> None:
        """Note what `path` is from here on; what was known of its parts is out of date."""
        env = self.scope.env
        parts = (f"{path}.", f"has:{path}.")
        for known in [key for key in env if "." in key and key.startswith(parts)]:
            del env[known]
        for known in [key for key, held in env.items() if held and _is_guard(held)]:
            if _mentions(env[known], path):
                env[known] = STALE
        # A condition on itself (`flag = flag and ...`) is about what is gone now.
        is_stale = has_sort(value, Sort.GUARD) and _mentions(value, path)
        env[path] = STALE if is_stale else value

    def bind(
        self, target: ast.expr, value: Value, source: ast.expr | None, *, is_local: bool = False
    ) -> None:
        """Give `target` a value, as an assignment, a loop or a `with` does."""
        match target:
            case ast.Name():
                self._bind_name(target.id, value, is_local)
            case ast.Tuple() | ast.List():
                parts = source.elts if isinstance(source, ast.Tuple | ast.List) else None
                for at, inner in enumerate(target.elts):
                    part = UNKNOWN
                    if parts is not None and len(parts) == len(target.elts):
                        part = self.peek(parts[at])
                    elif isinstance(inner, ast.Name):
                        part = self.by_name(inner.id)
                    self.bind(inner, part, None, is_local=is_local)
            case ast.Starred():
                self.bind(target.value, UNKNOWN, None, is_local=is_local)
            case ast.Attribute():
                self.infer(target)
                self._bind_attribute(target, value)
            case _:
                self.infer(target)

    def _bind_name(self, name: str, value: Value, is_local: bool) -> None:
        scope = self.scope
        if value == UNKNOWN and not scope.is_class:
            value = self.by_name(name)
        if name in scope.outer_names:
            self.global_values[name] = self.global_values.get(name, NOTHING) | value
            self.module.every[name] = self.module.every.get(name, NOTHING) | value
        self.set_path(name, value)
        if not is_local:
            scope.every[name] = scope.every.get(name, NOTHING) | value
            if scope is self.module:
                self.global_values[name] = self.global_values.get(name, NOTHING) | value
        if scope.is_class and scope.owner is not None:
            scope.owner.defines.add(name)
            scope.owner.attributes[name] = scope.owner.attributes.get(name, NOTHING) | value

    def _bind_attribute(self, target: ast.Attribute, value: Value) -> None:
        owner = self.scope.owner
        base = self.peek(target.value)
        if owner is not None and any(atom.name == owner.name for atom in base):
            owner.attributes[target.attr] = owner.attributes.get(target.attr, NOTHING) | value
            owner.defines.add(target.attr)
            if owner.sort is Sort.INSTANCE:
                self.foreign.add(target.attr)
        if has_sort(base, Sort.CLASS):
            self.book.patch(self, target, base)
        path = path_of(target)
        if path is not None:
            self.set_path(path, value)

    def by_name(self, name: str) -> Value:
        """What something is whose origin is not known, from what it is called."""
        if name in CONVENTIONAL and self.imports.uses_transformers:
            return CONVENTION
        return UNKNOWN

    # Statements.

    def block(self, statements: Sequence[ast.stmt]) -> bool:
        """Follow statements in their order; whether what comes after them is never reached."""
        for statement in statements:
            if self.statement(statement):
                return True
        return False

    def statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Expr():
                self.infer(node.value)
            case ast.Assign():
                self._assign(node)
            case ast.AnnAssign():
                self._annotated_assign(node)
            case ast.AugAssign():
                self.infer(node.value)
                self._augment(node)
            case ast.If():
                return self._if(node)
            case ast.For() | ast.AsyncFor():
                self._for(node)
            case ast.While():
                self._while(node)
            case ast.Try() | ast.TryStar():
                return self._try(node)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    self.infer(item.context_expr)
                    if item.optional_vars is not None:
                        self.bind(item.optional_vars, UNKNOWN, None)
                return self.block(node.body)
            case ast.Match():
                self._match(node)
            case ast.Return():
                value = NONE if node.value is None else self.infer(node.value)
                if self.scope.function is not None:
                    self.scope.function.returns |= value
                return True
            case ast.Raise():
                for part in (node.exc, node.cause):
                    if part is not None:
                        self.infer(part)
                return True
            case ast.Continue() | ast.Break():
                return True
            case ast.Assert():
                self.infer(node.test)
                narrow.narrow(self, node.test, True)
            case ast.Delete():
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.set_path(target.id, OTHER)
                    else:
                        self.infer(target)
            case ast.Import() | ast.ImportFrom():
                self._import(node)
            case ast.Global() | ast.Nonlocal():
                self.scope.outer_names.update(node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._function(node)
            case ast.ClassDef():
                self._class(node)
        return False

    def _assign(self, node: ast.Assign) -> None:
        value = self.infer(node.value)
        if narrow.value_of_guard(node.value):
            value = frozenset({Atom(Sort.GUARD, node=node.value)})
        for target in node.targets:
            self.bind(target, value, node.value)

    def _annotated_assign(self, node: ast.AnnAssign) -> None:
        self.infer(node.annotation)
        value = typed.annotated(self, node.annotation)
        if node.value is not None:
            found = self.infer(node.value)
            if not is_cache(value) or is_cache(found):
                value = found
        if node.value is not None or self.scope.is_class:
            self.bind(node.target, value, None)
        elif isinstance(node.target, ast.Name):
            self.set_path(node.target.id, value)

    def _augment(self, node: ast.AugAssign) -> None:
        self.infer(node.target)
        path = path_of(node.target)
        if path is not None:
            self.set_path(path, OTHER)
            if isinstance(node.target, ast.Name):
                self._bind_name(path, OTHER, False)
            elif isinstance(node.target, ast.Attribute):
                base = self.peek(node.target.value)
                owner = self.scope.owner
                if owner is not None and any(atom.name == owner.name for atom in base):
                    owner.attributes.setdefault(node.target.attr, OTHER)

    def _if(self, node: ast.If) -> bool:
        self.infer(node.test)
        decided = narrow.holds(self, node.test)
        if decided is not None:
            return self.block(node.body if decided else node.orelse)
        before = dict(self.scope.env)
        narrow.narrow(self, node.test, True)
        ends = self.block(node.body)
        after_body = self.scope.env
        self.scope.env = before
        narrow.narrow(self, node.test, False)
        else_ends = self.block(node.orelse)
        if ends and else_ends:
            return True
        if not ends:
            self.scope.env = after_body if else_ends else self._join(after_body, self.scope.env)
        return False

    def _join(self, first: dict[str, Value], second: dict[str, Value]) -> dict[str, Value]:
        joined: dict[str, Value] = {}
        for key in first.keys() | second.keys():
            if key.startswith("has:"):
                if key in first and key in second:
                    joined[key] = OTHER
            elif key in first and key in second:
                joined[key] = first[key] | second[key]
            elif "." not in key:
                # Bound on one way only: where it is used, it was bound.
                joined[key] = first.get(key, NOTHING) | second.get(key, NOTHING)
        return joined

    def _for(self, node: ast.For | ast.AsyncFor) -> None:
        value = self.infer(node.iter)
        if self.telling:
            self.tell_iteration(node.iter, node.target, node.body, value)
        self._loop(node.body, node.orelse, target=node.target, element=calls.element_of(value))

    def _while(self, node: ast.While) -> None:
        self.infer(node.test)
        self._loop(node.body, node.orelse, test=node.test)

    def _loop(
        self,
        body: Sequence[ast.stmt],
        orelse: Sequence[ast.stmt],
        *,
        target: ast.expr | None = None,
        element: Value = UNKNOWN,
        test: ast.expr | None = None,
    ) -> None:
        # Twice: what the body assigns is there when it begins again. The second time decides.
        for _ in range(2):
            before = dict(self.scope.env)
            if target is not None:
                self.bind(target, element, None)
            if test is not None:
                self.infer(test)
                narrow.narrow(self, test, True)
            self.block(body)
            self.scope.env = self._join(before, self.scope.env)
        self.block(orelse)

    def _try(self, node: ast.Try | ast.TryStar) -> bool:
        caught = {name for handler in node.handlers for name in _handled(handler)}
        attribute = bool(caught & _ATTRIBUTE_HANDLERS)
        imports = bool(caught & _IMPORT_HANDLERS)
        before = dict(self.scope.env)
        self.expecting_attribute_error += attribute
        self.expecting_import_error += imports
        ends = self.block(node.body)
        self.expecting_attribute_error -= attribute
        self.expecting_import_error -= imports
        if not ends:
            ends = self.block(node.orelse)
        after = None if ends else self.scope.env
        start = self._join(before, self.scope.env)
        for handler in node.handlers:
            self.scope.env = dict(start)
            if handler.type is not None:
                self.infer(handler.type)
            if handler.name is not None:
                self.set_path(handler.name, OTHER)
            if not self.block(handler.body):
                found = self.scope.env
                after = found if after is None else self._join(after, found)
        self.scope.env = start if after is None else after
        return self.block(node.finalbody) or after is None

    def _match(self, node: ast.Match) -> None:
        self.infer(node.subject)
        path = path_of(node.subject)
        before = dict(self.scope.env)
        joined = dict(before)
        for case in node.cases:
            self.scope.env = dict(before)
            for part in ast.walk(case.pattern):
                name = getattr(part, "name", None) or getattr(part, "rest", None)
                if isinstance(name, str):
                    self._bind_name(name, UNKNOWN, False)
            if isinstance(case.pattern, ast.MatchClass) and path is not None:
                self.set_path(path, typed.annotated(self, case.pattern.cls))
            if case.guard is not None:
                self.infer(case.guard)
                narrow.narrow(self, case.guard, True)
            if not self.block(case.body):
                joined = self._join(joined, self.scope.env)
        self.scope.env = joined

    # Definitions.

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for name, value in self.imports.bind(node).items():
            if self.expecting_import_error and has_sort(value, Sort.CLASS):
                self.book.guarded_names.add(name)
            self._bind_name(name, value, False)
        if self.telling:
            self.book.imported(self, node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        owner = self.scope.owner if self.scope.is_class else None
        info = self.functions.setdefault(id(node), FunctionInfo(node, owner))
        for part in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if part is not None:
                self.infer(part)
        for argument in self.arguments_of(node.args):
            if argument.annotation is not None:
                self.infer(argument.annotation)
        if node.returns is not None:
            self.infer(node.returns)
        if owner is not None:
            owner.methods[node.name] = info
            owner.defines.add(node.name)
            if owner.sort is Sort.INSTANCE:
                self.foreign.add(node.name)
            if self.telling:
                self.book.defined(self, node, owner)
        is_property = any(
            path_of(part) in {"property", "cached_property"} for part in node.decorator_list
        )
        if owner is not None and is_property:
            del owner.methods[node.name]
            returned = typed.annotated(self, node.returns)
            owner.attributes[node.name] = returned or info.returns or UNKNOWN
        self._bind_name(node.name, frozenset({Atom(Sort.FUNCTION, node.name, info)}), False)
        if owner is not None and is_property:
            owner.attributes[node.name] = (
                typed.annotated(self, node.returns) or info.returns or UNKNOWN
            )
        parent = self.scope
        self._bodies.append(
            _Body(
                info,
                Scope(
                    parent,
                    function=info,
                    owner=owner or parent.owner,
                    local=frozenset(),
                ),
            )
        )

    def _function_body(self, body: _Body) -> None:
        node = body.info.node
        outer, self.scope = self.scope, body.scope
        attribute, self.expecting_attribute_error = self.expecting_attribute_error, 0
        if body.info.local is None:
            body.info.local = bound_names(node)
        self.scope.local = body.info.local
        parameters = list(self.arguments_of(node.args))
        for at, argument in enumerate(parameters):
            if at == 0 and body.info.takes_self and body.info.owner is not None:
                owner = body.info.owner
                sort = Sort.CLASS if body.info.is_class_method else owner.sort
                value: Value = frozenset({Atom(sort, owner.name)})
            elif id(node) in self.book.normalised and argument.arg == "past_key_values":
                value = LEGACY | NONE
            else:
                value = self.parameter(
                    argument,
                    body.info.arguments.get(argument.arg, NOTHING),
                    _default(node, argument),
                )
            self._bind_name(argument.arg, value, False)
        self.block(node.body)
        self.scope = outer
        self.expecting_attribute_error = attribute

    def arguments_of(self, spec: ast.arguments) -> Iterator[ast.arg]:
        """All parameters of a function."""
        yield from (*spec.posonlyargs, *spec.args)
        if spec.vararg is not None:
            yield spec.vararg
        yield from spec.kwonlyargs
        if spec.kwarg is not None:
            yield spec.kwarg

    def parameter(self, argument: ast.arg, given: Value, default: ast.expr | None = None) -> Value:
        """What a parameter may be, from its annotation, its name and the calls in this file."""
        declared = typed.annotated(self, argument.annotation)
        conventional = argument.arg in CONVENTIONAL and self.imports.uses_transformers
        if declared:
            rest = without(declared, Sort.NONE)
            if conventional and (not rest or rest <= LEGACY):
                return CONVENTION  # old code annotates its caches as lists of tensors
            if not has_sort(rest, Sort.UNKNOWN) or is_cache(rest):
                return declared
            if any(atom.name for atom in rest if atom.sort is Sort.UNKNOWN):
                return declared
        if conventional:
            return CONVENTION
        if without(given, Sort.NONE):
            return given
        if default is not None and is_cache(found := self.peek(default)):
            return found
        return declared or UNKNOWN

    def _class(self, node: ast.ClassDef) -> None:
        bases = [self.infer(base) for base in node.bases]
        for part in (*node.decorator_list, *(keyword.value for keyword in node.keywords)):
            self.infer(part)
        info = self.class_infos.get(id(node))
        if info is None:
            info = self.class_infos[id(node)] = self._describe(node, bases)
        self.classes[node.name] = info
        self._bind_name(node.name, frozenset({Atom(Sort.CLASS, node.name)}), False)
        outer = self.scope
        self.scope = Scope(outer, owner=info, is_class=True)
        self.block(node.body)
        self.scope = outer

    def _describe(self, node: ast.ClassDef, bases: list[Value]) -> ClassInfo:
        sort, root, is_model = Sort.INSTANCE, "", False
        for base, value in zip(node.bases, bases, strict=True):
            is_model |= (path_of(base) or "").rpartition(".")[2] in {"Module", *MODEL_CLASSES}
            for atom in value:
                if atom.sort is not Sort.CLASS:
                    continue
                known = self.classes.get(atom.name)
                is_model |= "PreTrained" in atom.name or (known is not None and known.is_model)
                if known is not None and known.sort is not Sort.INSTANCE:
                    sort, root = known.sort, known.root
                elif known is None and atom.name in CACHE_CLASSES:
                    sort, root = Sort.CACHE, atom.name
                elif known is None and atom.name in LAYER_CLASSES:
                    sort, root = Sort.LAYER, atom.name
        return ClassInfo(node.name, sort, root, is_model)


def _handled(handler: ast.ExceptHandler) -> Iterator[str]:
    if handler.type is None:
        yield ""
        return
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    for found in types:
        yield (path_of(found) or "?").rpartition(".")[2]


def _default(node: ast.FunctionDef | ast.AsyncFunctionDef, argument: ast.arg) -> ast.expr | None:
    positional = [*node.args.posonlyargs, *node.args.args]
    if argument in positional:
        at = positional.index(argument) - len(positional) + len(node.args.defaults)
        return node.args.defaults[at] if at >= 0 else None
    if argument in node.args.kwonlyargs:
        return node.args.kw_defaults[node.args.kwonlyargs.index(argument)]
    return None


def _is_guard(value: Value) -> bool:
    for atom in value:  # a plain loop: this is asked of every name at every assignment
        if atom.sort is Sort.GUARD:
            return True
    return False


def _mentions(value: Value, path: str) -> bool:
    return any(
        path_of(part) == path
        for atom in value
        if isinstance(atom.node, ast.AST)
        for part in ast.walk(atom.node)
        if isinstance(part, ast.Name | ast.Attribute)
    )
