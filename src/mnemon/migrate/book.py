"""Where rules write down what they decide about each place; the last word on a place counts."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mnemon.migrate.edit import Transform
from mnemon.migrate.model import Status
from mnemon.migrate.rules.base import Rule
from mnemon.migrate.scope import children
from mnemon.migrate.values import Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow
    from mnemon.migrate.scope import FunctionInfo

__all__ = ["Book", "Decision"]


@final
@dataclass(slots=True, kw_only=True)
class Decision:
    """What one rule says of one place.

    Args:
        rule: key of the name.
        status: rewritten or undecided.
        node: what the user should look at.
        message: what was done, or why nothing was.
        edited: the expression that changes.
        transform: how.
        loose: the result needs parentheses where its place binds tighter.
        if_old: only a rewrite when the rest of the file is old code; else this reason is given.
    """

    rule: str
    status: Status
    node: ast.expr | ast.stmt
    message: str
    edited: ast.expr | None = None
    transform: Transform | None = None
    loose: bool = False
    if_old: str | None = None


@final
class Book:
    """The decisions about one file."""

    def __init__(self, tree: ast.Module, rules: Sequence[Rule]) -> None:
        self.parents: dict[int, ast.AST] = {}
        self.nodes: list[ast.AST] = [tree]
        for node in self.nodes:  # grows while it is gone through
            found = children(node)
            for child in found:
                self.parents[id(child)] = node
            self.nodes += found
        self.listening = {
            event: [
                rule for rule in rules if getattr(type(rule), event) is not getattr(Rule, event)
            ]
            for event in ("subscript", "iteration", "call", "name", "definition")
        }
        self.rules = rules
        self.by_attribute: dict[str, list[Rule]] = {}
        for rule in rules:
            for name in rule.attributes:
                self.by_attribute.setdefault(name, []).append(rule)
        self.decisions: dict[tuple[int, str], list[Decision]] = {}
        self.guarded_names: set[str] = set()  # imported inside try ... except ImportError
        self.patched: set[str] = set()  # attributes that the file gives to transformers' classes
        self.imports: list[ast.ImportFrom] = []
        self.class_uses: dict[int, tuple[ast.Name | ast.Attribute, str]] = {}
        self.handled: dict[int, str] = {}  # class uses that a rule rewrites -> the class it needs
        # statement -> (key, what stands in its place, message)
        self.statements: dict[int, tuple[ast.stmt, str, tuple[str, ...], str]] = {}
        self.doubts: dict[tuple[int, str], FunctionInfo | None] = {}
        self.doubts_at: dict[tuple[int, str], int] = {}
        self.normalised: set[int] = set()  # functions that turn a cache into a tuple first
        self.is_encoder_decoder = False
        self._trigger: tuple[int, str] = (0, "")

    # What the flow tells.

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        rules = self.by_attribute.get(node.attr)
        if rules is None:
            return
        self._begin(node, "attribute")
        if self.is_guarded(flow, node.value, node.attr) or node.attr in self.patched:
            return
        for rule in rules:
            rule.attribute(flow, node, base)

    def subscript(self, flow: Flow, node: ast.Subscript, base: Value) -> None:
        self._begin(node, "subscript")
        for rule in self.listening["subscript"]:
            rule.subscript(flow, node, base)

    def iteration(
        self,
        flow: Flow,
        iterated: ast.expr,
        target: ast.expr | None,
        body: Sequence[ast.AST],
        value: Value,
    ) -> None:
        self._begin(iterated, "iteration")
        for rule in self.listening["iteration"]:
            rule.iteration(flow, iterated, target, body, value)

    def call(
        self,
        flow: Flow,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        self._begin(node, "call")
        for rule in self.listening["call"]:
            rule.call(flow, node, function, arguments, keywords)

    def name(self, flow: Flow, node: ast.Name | ast.Attribute, value: Value) -> None:
        self._begin(node, "name")
        for rule in self.listening["name"]:
            rule.name(flow, node, value)

    def imported(self, flow: Flow, node: ast.Import | ast.ImportFrom) -> None:
        is_guarded = flow.expecting_import_error > 0
        if isinstance(node, ast.ImportFrom) and flow.imports.origin(node) and not is_guarded:
            self.imports.append(node)

    def defined(
        self, flow: Flow, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: object
    ) -> None:
        self._begin(node, "definition")
        for rule in self.listening["definition"]:
            rule.definition(flow, node, owner)

    def patch(self, flow: Flow, target: ast.Attribute, base: Value) -> None:
        if target.attr not in self.by_attribute:
            return
        names = {atom.name for atom in base if atom.sort is Sort.CLASS}
        if any(not name.startswith("transformers.") and name not in flow.classes for name in names):
            self.patched.add(target.attr)
            self._begin(target, "patch")
            key = self.by_attribute[target.attr][0].key_of(target.attr)
            self.undecided(key, target, f"`{target.attr}` is put on a class of transformers here")

    # What the rules say.

    def _begin(self, node: ast.AST, event: str) -> None:
        self._trigger = (id(node), event)
        self.decisions.pop(self._trigger, None)

    def rewrite(
        self,
        key: str,
        node: ast.expr,
        edited: ast.expr,
        transform: Transform,
        message: str,
        *,
        loose: bool = False,
        if_old: str | None = None,
    ) -> None:
        """Change `edited`; `node` is where the old name stands."""
        self.decisions.setdefault(self._trigger, []).append(
            Decision(
                rule=key,
                status=Status.REWRITTEN,
                node=node,
                message=message,
                edited=edited,
                transform=transform,
                loose=loose,
                if_old=if_old,
            )
        )

    def undecided(self, key: str, node: ast.expr | ast.stmt, reason: str) -> None:
        """Leave `node` alone and say why."""
        self.decisions.setdefault(self._trigger, []).append(
            Decision(rule=key, status=Status.UNDECIDED, node=node, message=reason)
        )

    def replace_statement(
        self, key: str, node: ast.stmt, lines: tuple[str, ...], message: str
    ) -> None:
        """Put other lines where a whole statement stands; none removes it."""
        self.statements[id(node)] = (node, key, lines, message)

    def doubt(self, flow: Flow, node: ast.expr) -> bool:
        """Note that `node` may be a tuple or a cache; whether this function was told so before."""
        function = flow.scope.function
        key = (id(function), ast.unparse(node))
        self.doubts[key] = function
        return self.doubts_at.setdefault(key, self._trigger[0]) != self._trigger[0]

    # What rules ask.

    def is_replaced(self, node: ast.AST) -> bool:
        """Whether a whole statement around `node` is replaced."""
        return any(id(ancestor) in self.statements for ancestor in self.ancestors(node))

    def neighbours(self, node: ast.AST) -> list[ast.stmt]:
        """The statements of the block in which `node` stands."""
        inner = node
        for ancestor in self.ancestors(node):
            if isinstance(inner, ast.stmt):
                for name in ("body", "orelse", "finalbody"):
                    block = getattr(ancestor, name, None)
                    if isinstance(block, list) and inner in block:
                        return block
                return []
            inner = ancestor
        return []

    def parent(self, node: ast.AST) -> ast.AST | None:
        return self.parents.get(id(node))

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        found = self.parent(node)
        while found is not None:
            yield found
            found = self.parent(found)

    def is_guarded(self, flow: Flow, receiver: ast.expr, name: str) -> bool:
        """Whether code around it already asks for the name and has another way without it."""
        if flow.expecting_attribute_error:
            return True
        return f"has:{flow.path(receiver)}.{name}" in flow.scope.env

    def is_old(self, decisions: list[Decision]) -> bool:
        """Whether something in the file was surely written for an old release."""
        return bool(self.statements) or any(
            found.if_old is None and found.status is Status.REWRITTEN for found in decisions
        )

    def all(self) -> list[Decision]:
        """Every decision; rewrites that only old code justifies are settled here."""
        found = [decision for listed in self.decisions.values() for decision in listed]
        is_old = self.is_old(found)
        for decision in found:
            if decision.if_old is not None and not is_old:
                decision.status, decision.message = Status.UNDECIDED, decision.if_old
                decision.edited = decision.transform = None
        return found
