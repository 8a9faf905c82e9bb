"""What else keeps old modeling files from running: not the cache, but generate and loading.

Tied weights are a mapping since 5.0, `rope_scaling` is never None, and generate hands
`prepare_inputs_for_generation` positions of the whole sequence and no `cache_position`. Looked for
in classes that descend from a model of transformers, and nowhere else.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate import buffers, masks, removed, rope
from mnemon.migrate.edit import span
from mnemon.migrate.scope import ClassInfo, path_of
from mnemon.migrate.splicing import Function, Pair, at_door, finding, spliced
from mnemon.migrate.text import Source

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["EXTRA_RULES", "WORDS", "find"]

# rule -> (old, modern, why)
EXTRA_RULES = {
    "tied_weights_keys": (
        '_tied_weights_keys = ["lm_head.weight"]',
        '_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}',
        "Since 5.0 it says to which weight each one is tied.",
    ),
    "rope_scaling": (
        "config.rope_scaling is None",
        'config.rope_scaling.get("rope_type", "default") == "default"',
        "Since 5.0 a config without scaling has a dict that says so.",
    ),
    "non_persistent_buffer": (
        'self.register_buffer("inv_freq", inv_freq, persistent=False)',
        "the same again in _init_weights, from what the module was made with",
        "Since 5.0 models are made without memory and only saved tensors are loaded.",
    ),
    "rope_default": (
        "ROPE_INIT_FUNCTIONS[kind]",
        '{"default": _default_rope_parameters, **ROPE_INIT_FUNCTIONS}[kind]',
        "Since 5.0 the table has no default.",
    ),
    "mask_arguments": (
        "create_causal_mask(input_embeds=x, cache_position=p, ...)",
        "create_causal_mask(inputs_embeds=x, ...)",
        "Since 5.10 masks take no `cache_position`.",
    ),
    "tie_word_embeddings": (
        "class Model(PreTrainedModel) with _tied_weights_keys",
        'if not hasattr(config, "tie_word_embeddings"): config.tie_word_embeddings = True',
        "Since 5.0 configs have no such default, and weights would not be tied.",
    ),
    "config_default": (
        "config.add_cross_attention",
        'getattr(config, "add_cross_attention", False)',
        "Since 5.0 configs have no defaults of that kind.",
    ),
    "get_head_mask": (
        "self.get_head_mask(head_mask, n)",
        "_get_head_mask(self, head_mask, n)",
        "Since 5.0 models have no such method.",
    ),
    "generate_position_ids": (
        'position_ids = kwargs.get("position_ids")',
        "position_ids = position_ids[..., -input_ids.shape[1] :]",
        "Since 5.0 generate passes the positions of the whole sequence.",
    ),
    "generate_attention_mask": (
        "def prepare_inputs_for_generation(..., attention_mask)",
        "attention_mask = input_ids.new_ones(input_ids.shape)",
        "Since 5.4 generate passes no mask that hides nothing.",
    ),
    "generate_cache_position": (
        "def prepare_inputs_for_generation(..., cache_position)",
        "cache_position = torch.arange(past, input_ids.shape[1])",
        "Since 5.4 generate passes none.",
    ),
}
WORDS = (
    "_tied_weights_keys",
    "rope_scaling",
    "prepare_inputs_for_generation",
    "register_buffer",
    "ROPE_INIT_FUNCTIONS",
    "forced_bos_token_id",
    "input_embeds",
    "masking_utils",
)


def find(source: Source, flow: Flow, *, is_old: bool) -> list[Pair]:
    """Every such place, with what stands there instead; None for what a person must decide.

    Args:
        source: the file.
        flow: what is known of it.
        is_old: something else in it was surely written for an old release; what `generate` passes
            is only made up for in such a file.
    """
    if not flow.target.at_least("5.0"):
        return []
    found = rope.find(source, flow) + masks.find(source, flow)
    found += removed.own_config_defaults(source, flow)
    if not any(
        info.is_model and "PreTrained" in _bases(flow, info) for info in flow.classes.values()
    ):
        return found
    models = [
        (node, info)
        for node in flow.tree.body
        if isinstance(node, ast.ClassDef)
        and (info := flow.class_infos.get(id(node))) is not None
        and info.is_model
    ]
    found += [pair for node, info in models for pair in _tied(source, flow, node, info)]
    is_old = is_old or bool(found)
    found += buffers.find(source, flow, may_edit=is_old)
    if not is_old:
        return found
    found += _scalings(source, flow)
    found += removed.config_defaults(source, flow) + removed.head_masks(source, flow)
    for node, _ in models:
        for statement in node.body:
            if not isinstance(statement, Function):
                continue
            # All on one line there is no place for another statement.
            has_place = statement.body[0].lineno > statement.lineno
            if statement.name == "prepare_inputs_for_generation" and has_place:
                found += _positions(source, statement)
                found += _position_parameter(source, statement)
                found += _attention_mask(source, flow, statement)
                found += _cache_position(source, flow, statement)
    return found


def _bases(flow: Flow, info: ClassInfo) -> str:
    """The bases of a class of the file, as they are written."""
    for node in flow.tree.body:
        if isinstance(node, ast.ClassDef) and flow.class_infos.get(id(node)) is info:
            return " ".join(ast.unparse(base) for base in node.bases)
    return ""


def _scalings(source: Source, flow: Flow) -> list[Pair]:
    return [
        pair
        for node in flow.book.nodes
        if type(node) is ast.Compare
        for pair in _scaling(source, node)
    ]


def _tied(source: Source, flow: Flow, node: ast.ClassDef, info: ClassInfo) -> list[Pair]:
    for statement in node.body:
        match statement:
            case ast.Assign(
                targets=[ast.Name(id="_tied_weights_keys")],
                value=ast.List(elts=names) | ast.Tuple(elts=names),
            ):
                pass
            case _:
                continue
        embeddings = _embeddings(flow, node)
        keys = [
            name.value
            for name in names
            if isinstance(name, ast.Constant) and isinstance(name.value, str)
        ]
        if embeddings is None or len(keys) != len(names) or not keys:
            reason = "it is a mapping today, and which weight they are tied to is not plain here"
            return [(finding(source, "tied_weights_keys", statement, reason), None)]
        keys = [_whole(flow, node, key) for key in keys]
        pairs = ", ".join(f'"{key}": "{embeddings}.weight"' for key in keys)
        start, end = span(source, statement.value)
        message = "a list of tied weights -> which weight each is tied to"
        mapping = f"{{{pairs}}}"
        return [
            spliced(source, "tied_weights_keys", statement, start, end, mapping, message),
            removed.ties(source, node),
        ]
    return []


def _embeddings(flow: Flow, node: ast.ClassDef, depth: int = 0) -> str | None:
    """The path of the input embeddings inside a model of this class."""
    for part in node.body:
        match part:
            case ast.FunctionDef(name="get_input_embeddings", body=[*_, ast.Return(value=value)]):
                path = path_of(value) if value is not None else None
                if path is not None and path.startswith("self."):
                    return path[len("self.") :]
    classes = {c.name: c for c in flow.tree.body if isinstance(c, ast.ClassDef)}
    made = _made_in(node)
    for attribute, call in made:
        if _last(call.func) == "Embedding":
            return attribute
    for attribute, call in made:
        inner = classes.get(_last(call.func))
        if inner is not None and inner is not node and not depth:
            own = _embeddings(flow, inner, 1)
            if own is not None:
                return f"{attribute}.{own}"
    return None


def _whole(flow: Flow, node: ast.ClassDef, key: str) -> str:
    """The path of a weight from this class, where old lists gave the last part of it."""
    first = key.split(".")[0].lstrip("^")
    classes = {c.name: c for c in flow.tree.body if isinstance(c, ast.ClassDef)}
    made = _made_in(node)
    if any(attribute == first for attribute, _ in made):
        return key
    for attribute, call in made:
        inner = classes.get(_last(call.func))
        if inner is not None and any(name == first for name, _ in _made_in(inner)):
            return f"{attribute}.{key}"
    return key


def _made_in(node: ast.ClassDef) -> list[tuple[str, ast.Call]]:
    """(name, call) of every `self.name = call(...)` in a class."""
    found: list[tuple[str, ast.Call]] = []
    for part in ast.walk(node):
        match part:
            case ast.Assign(
                targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)],
                value=ast.Call() as call,
            ):
                found.append((name, call))
    return found


def _last(node: ast.expr) -> str:
    return (path_of(node) or "").rpartition(".")[2]


def _scaling(source: Source, node: ast.AST) -> list[Pair]:
    """`config.rope_scaling is None`, if that is what `node` is."""
    match node:
        case ast.Compare(
            left=ast.Attribute(attr="rope_scaling") as left,
            ops=[ast.Is() | ast.IsNot() as sign],
            comparators=[ast.Constant(value=None)],
        ):
            start, end = span(source, node)
            shown = source.utf8[slice(*span(source, left))].decode()
            equal = "==" if isinstance(sign, ast.Is) else "!="
            text = f'(({shown} or {{}}).get("rope_type", "default") {equal} "default")'
            message = "`rope_scaling` against None -> against what it is without scaling"
            return [spliced(source, "rope_scaling", node, start, end, text, message)]
    return []


def _positions(source: Source, node: Function) -> list[Pair]:
    for block in _blocks(node):
        for at, statement in enumerate(block):
            match statement:
                case ast.Assign(
                    targets=[ast.Name(id="position_ids")],
                    value=ast.Call(
                        func=ast.Attribute(attr="get"),
                        args=[ast.Constant(value="position_ids"), *_],
                    ),
                ):
                    pass
                case _:
                    continue
            following = block[at + 1] if at + 1 < len(block) else None
            if following is not None and _is_cut(following):
                return []
            indent = " " * statement.col_offset
            newline = source.newline
            text = (
                f"{newline}{indent}if position_ids is not None:"
                f"{newline}{indent}    position_ids = position_ids[..., -input_ids.shape[1] :]"
            )
            _, end = span(source, statement)
            message = "generate passes the positions of the whole sequence: cut to the new tokens"
            found = [spliced(source, "generate_position_ids", statement, end, end, text, message)]
            return found + _forgotten(source, block[at + 1 :])
    return []


def _forgotten(source: Source, block: list[ast.stmt]) -> list[Pair]:
    """`else: position_ids = None`, from when generate passed none: it would drop what it passes."""
    for statement in block:
        match statement:
            case ast.If(
                orelse=[
                    ast.Assign(
                        targets=[ast.Name(id="position_ids")], value=ast.Constant(value=None)
                    ) as dropped
                ]
            ) if "position_ids is None" in ast.unparse(statement.test):
                start, end = span(source, statement.body[-1])[1], span(source, dropped)[1]
                message = "generate passes positions: they are not thrown away"
                return [spliced(source, "generate_position_ids", dropped, start, end, "", message)]
    return []


def _position_parameter(source: Source, node: Function) -> list[Pair]:
    """Where `position_ids` comes as a parameter and is only made, and cut, while it is None."""
    if not any(argument.arg == "position_ids" for argument in node.args.args):
        return []
    for before, statement in zip([None, *node.body], node.body, strict=False):
        if not isinstance(statement, ast.If) or before is None:
            continue
        if "position_ids is None" not in ast.unparse(statement.test):
            continue
        if _is_cut(before):
            return []
        start = source.starts[statement.lineno - 1]
        indent = source.utf8[start : start + statement.col_offset].decode()
        newline = source.newline
        text = (
            f"{indent}if position_ids is not None:{newline}"
            f"{indent}    position_ids = position_ids[..., -input_ids.shape[1] :]{newline}"
        )
        message = "generate passes the positions of the whole sequence: cut to the new tokens"
        return [spliced(source, "generate_position_ids", node, start, start, text, message)]
    return []


def _attention_mask(source: Source, flow: Flow, node: Function) -> list[Pair]:
    names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    if not flow.target.at_least("5.4") or not {"attention_mask", "input_ids"} <= names:
        return []
    text = source.utf8[slice(*span(source, node))].decode()
    if "attention_mask is None:" in text or flow.book.is_encoder_decoder:
        return []
    lines = (
        "if attention_mask is None:",
        "    attention_mask = input_ids.new_ones(input_ids.shape)",
    )
    message = "generate passes no mask of ones: made where there is none"
    return [at_door(source, "generate_attention_mask", node, lines, message)]


def _is_cut(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "position_ids is not None"


def _blocks(node: ast.AST) -> list[list[ast.stmt]]:
    return [
        block
        for part in ast.walk(node)
        for name in ("body", "orelse")
        if isinstance(block := getattr(part, name, None), list) and block
    ]


def _cache_position(source: Source, flow: Flow, node: Function) -> list[Pair]:
    names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    wanted = {"cache_position", "past_key_values", "input_ids"}
    if not flow.target.at_least("5.4") or not wanted <= names:
        return []
    text = source.utf8[slice(*span(source, node))].decode()
    reads = "cache_position." in text or "cache_position[" in text
    if not reads or "cache_position is None" in text or "cache_position is not None" in text:
        return []
    if "torch" not in flow.module.every:
        reason = "generate passes no `cache_position` today; compute it from the cache's length"
        return [(finding(source, "generate_cache_position", node, reason), None)]
    lines = (
        "if cache_position is None:",
        "    cache_position = torch.arange(",
        "        0 if past_key_values is None else past_key_values.get_seq_length(),",
        "        input_ids.shape[1],",
        "        device=input_ids.device,",
        "    )",
    )
    message = "generate passes no `cache_position`: made from the cache's length"
    return [at_door(source, "generate_cache_position", node, lines, message)]
