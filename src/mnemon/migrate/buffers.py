"""Tensors that `__init__` computes and nobody saves: made again where 5.x initialises weights.

Since 5.0 a model is made without memory, and loading replaces buffers that are not saved by memory
that holds anything. `_init_weights` is called for every module after that. A class that registers
such buffers notes what it was made with; the file's models make another one and take its buffers.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate.scope import path_of
from mnemon.migrate.splicing import Function, Pair, at_door, before, finding, line_after, spliced
from mnemon.migrate.text import Source

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["KEY", "find"]

KEY = "non_persistent_buffer"
_HELPER = "_restore_buffers"
_NOTE = "_init_arguments"
_WIDTH = 100
_LOST = (
    "models are made without memory since 5.0, so what is computed here is lost on loading; "
    "compute it where it is used, or again in `_init_weights`"
)
_TEXT = f'''
def {_HELPER}(module):
    """Compute again what is not saved: since transformers 5.0, loading leaves it undefined.

    Returns whether nothing of this module is left to initialize: its weights were loaded.
    """
    arguments = getattr(module, "{_NOTE}", None)
    if arguments is None:
        return False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        fresh = type(module)(**arguments)
    device = None
    for name, buffer in fresh.named_buffers(recurse=False):
        if name in fresh._non_persistent_buffers_set:
            old = getattr(module, name)
            device = old.device
            setattr(module, name, buffer.to(device=device, dtype=old.dtype))
    for name, value in vars(fresh).items():
        if isinstance(value, torch.Tensor):  # another name of a buffer
            setattr(module, name, value.to(device=device, dtype=getattr(module, name).dtype))
    return all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters())
'''


def find(source: Source, flow: Flow, *, may_edit: bool) -> list[Pair]:
    """Every class that loses something on loading, and what mends it.

    Args:
        source: the file.
        flow: what is known of it.
        may_edit: the file is surely old code; otherwise it is only reported.
    """
    classes = {node.name: node for node in flow.tree.body if isinstance(node, ast.ClassDef)}
    models = {name for name, node in classes.items() if _is_model(node, classes)}
    lost = {name: calls for name, node in classes.items() if (calls := _computed(node))}
    doors = [_method(classes[name], "_init_weights") for name in models]
    told = " ".join(ast.unparse(door) for door in doors if door is not None)
    is_mended = f"{_HELPER}(" in told
    lost = {
        name: calls
        for name, calls in lost.items()
        if not _is_handled(classes[name], calls, "" if is_mended else told)
        and (may_edit or name not in told)
        and not (is_mended and _is_noted(_maker(classes[name], classes)))
    }
    if not lost:
        return []
    if not may_edit or not models or "torch" not in flow.module.every:
        return [_undecided(source, call, _LOST) for calls in lost.values() for call in calls]
    problems: dict[str, str] = {}
    makers: dict[str, ast.ClassDef] = {}
    for name in (name for name in classes if _line(name, classes) & lost.keys()):
        maker = _maker(classes[name], classes)
        if name in models:
            problems[name] = f"a whole model is not made again for it; {_LOST}"
        elif maker is None:
            problems[name] = f"`__init__` is not in this file; {_LOST}"
        elif (problem := _problem(maker, lost, classes)) is not None:
            problems[name] = problem
        elif not _takes_any(maker):
            makers[name] = maker
    # What one heir cannot say would be made with what its base was told: none of them then.
    stuck = {base for name in problems for base in _line(name, classes)} & lost.keys()
    found = [
        _undecided(source, call, problems.get(name) or next(iter(problems.values())))
        for name in lost
        if _line(name, classes) & stuck
        for call in lost[name]
    ]
    noting = {m.name: m for name, m in makers.items() if not _line(name, classes) & stuck}
    if not noting:
        return found
    edits = [_noted(source, node) for node in noting.values() if not _is_noted(node)]
    edits += _doors(source, classes, models)
    if not edits:
        return found
    if _HELPER not in flow.module.every:
        first = min((classes[name] for name in models), key=lambda node: node.lineno)
        at, text = before(source, first, _TEXT)
        message = "computes what is not saved again after loading"
        edits.append(spliced(source, KEY, first, at, at, text, message))
    return found + edits


def _undecided(source: Source, call: ast.Call, reason: str) -> Pair:
    return finding(source, KEY, call, reason), None


def _is_model(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> bool:
    """Whether a class descends from a pretrained model, in this file or from elsewhere."""
    return any(
        "PreTrained" in base or (base in classes and _is_model(classes[base], classes))
        for base in _bases(node)
        if base != node.name
    )


def _bases(node: ast.ClassDef) -> list[str]:
    return [(path_of(base) or "").rpartition(".")[2] for base in node.bases]


def _computed(node: ast.ClassDef) -> list[ast.Call]:
    """Where a class registers a buffer that is computed and not saved."""
    return [
        part
        for method in node.body
        if isinstance(method, Function) and method.name != "forward"
        for part in ast.walk(method)
        if isinstance(part, ast.Call) and _is_lost(part)
    ]


def _is_lost(node: ast.Call) -> bool:
    match node.func:
        case ast.Attribute(value=ast.Name(id="self"), attr="register_buffer"):
            pass
        case _:
            return False
    given = dict(zip(("name", "tensor", "persistent"), node.args, strict=False))
    given |= {word.arg: word.value for word in node.keywords if word.arg}
    kept = given.get("persistent")
    is_kept = not (isinstance(kept, ast.Constant) and kept.value is False)
    value = given.get("tensor")
    return not is_kept and value is not None and not isinstance(value, ast.Constant)


def _is_handled(node: ast.ClassDef, calls: list[ast.Call], told: str) -> bool:
    """Whether the file, or transformers itself, computes these again already."""
    firsts = [call.args[0] for call in calls if call.args]
    names = {str(first.value) for first in firsts if isinstance(first, ast.Constant)}
    if names and all(f".{name}" in told for name in names):
        return True
    # As models of 5.x are written: transformers calls this method for them.
    is_rope = "original_inv_freq" in names and "RotaryEmbedding" in node.name
    return is_rope and _method(node, "compute_default_rope_parameters") is not None


def _line(name: str, classes: dict[str, ast.ClassDef]) -> set[str]:
    """A class and those of this file that it descends from."""
    found = {name}
    for base in _bases(classes[name]):
        if base in classes and base != name:
            found |= _line(base, classes)
    return found


def _maker(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> ast.ClassDef | None:
    """The class of the file whose `__init__` makes a `node`."""
    if _method(node, "__init__") is not None:
        return node
    for base in _bases(node):
        if base in classes and base != node.name:
            return _maker(classes[base], classes)
    return None


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == name), None)


def _takes_any(node: ast.ClassDef) -> bool:
    init = _method(node, "__init__")
    return init is not None and init.args.vararg is not None


def _problem(
    node: ast.ClassDef, lost: dict[str, list[ast.Call]], classes: dict[str, ast.ClassDef]
) -> str | None:
    """Why what a class is made with cannot be noted; None if it can."""
    if _is_noted(node):
        return None
    init = _method(node, "__init__")
    assert init is not None
    if _takes_any(node):  # what it hands on to a class of the file is noted there
        is_heir = any(base in lost for base in _bases(node) if base in classes)
        return None if is_heir else f"`__init__` takes any arguments; {_LOST}"
    made = _super_call(init)
    if made is None or init.args.posonlyargs or not init.args.args:
        return f"it is not plain what an object is made with; {_LOST}"
    at = init.body.index(made)
    following = init.body[at + 1] if at + 1 < len(init.body) else None
    if following is not None and following.lineno == made.end_lineno:
        return f"there is no line of its own after `super().__init__()`; {_LOST}"
    parameters = {argument.arg for argument in (*init.args.args[1:], *init.args.kwonlyargs)}
    star = init.args.kwarg.arg if init.args.kwarg else None
    for statement in init.body[:at]:
        for part in ast.walk(statement):
            if isinstance(part, ast.Name) and (
                part.id == star or (part.id in parameters and not isinstance(part.ctx, ast.Load))
            ):
                return f"`{part.id}` changes before it could be noted; {_LOST}"
    return None


def _super_call(init: ast.FunctionDef) -> ast.stmt | None:
    """`super().__init__(...)` as a statement of its own."""
    for statement in init.body:
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="__init__"))):
                return statement
    return None


def _is_noted(node: ast.ClassDef | None) -> bool:
    init = None if node is None else _method(node, "__init__")
    return init is not None and any(
        isinstance(part, ast.Attribute) and part.attr == _NOTE for part in ast.walk(init)
    )


def _noted(source: Source, node: ast.ClassDef) -> Pair:
    """The line that notes what an object was made with."""
    init = _method(node, "__init__")
    assert init is not None
    made = _super_call(init)
    assert made is not None
    names = [argument.arg for argument in (*init.args.args[1:], *init.args.kwonlyargs)]
    given = [f"{name}={name}" for name in names]
    given += [f"**{init.args.kwarg.arg}"] if init.args.kwarg else []
    lines = [f"self.{_NOTE} = dict({', '.join(given)})"]
    if made.col_offset + len(lines[0]) > _WIDTH:
        lines = [f"self.{_NOTE} = dict(", *(f"    {part}," for part in given), ")"]
    at, text = line_after(source, made, lines)
    message = "notes what it was made with, to compute its buffers again after loading"
    return spliced(source, KEY, init, at, at, text, message)


def _doors(source: Source, classes: dict[str, ast.ClassDef], models: set[str]) -> list[Pair]:
    """`_init_weights` of every model that has one, or that needs one."""
    found: list[Pair] = []
    message = "computes buffers that are not saved again"
    for name in sorted(models, key=lambda name: classes[name].lineno):
        node = classes[name]
        door = _method(node, "_init_weights")
        if door is None:
            if any(base in models for base in _bases(node)):
                continue
            lines = (
                "",
                "def _init_weights(self, module):",
                f"    if not {_HELPER}(module):",
                "        super()._init_weights(module)",
            )
            last = node.body[-1]
            at, text = line_after(source, last, list(lines))
            found.append(spliced(source, KEY, node.body[0], at, at, text, message))
            continue
        if f"{_HELPER}(" in ast.unparse(door) or len(door.args.args) < 2:
            continue
        module = door.args.args[1].arg
        guard = (f"if {_HELPER}({module}):", "    return")
        found.append(at_door(source, KEY, door, guard, message))
    return found
