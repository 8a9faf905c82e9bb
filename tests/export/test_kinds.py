"""Caches that are more than growing keys and values: in the graph's memory, in few bits, states."""

from typing import Any

import pytest
import torch
from tests.export.tiny import build
from transformers import DynamicCache, PreTrainedModel

import mnemon
from mnemon.errors import ExportError
from mnemon.export import Exported, HeldCache
from mnemon.export.few_rows import few_rows
from mnemon.export.kinds import part_from_json
from mnemon.export.verify import grid, verify

# One worker makes the exports that all tests here share.
pytestmark = pytest.mark.xdist_group("export_kinds")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def static(llama: PreTrainedModel) -> Exported:
    return mnemon.export_model(llama, cache="static(40)", ranges={"batch": 2})


@pytest.fixture(scope="module")
def packed(llama: PreTrainedModel) -> Exported:
    return mnemon.export_model(llama, cache="int4")


@pytest.fixture(scope="module")
def jamba() -> tuple[PreTrainedModel, Exported]:
    model = build("jamba")
    return model, mnemon.export_model(model, verify=False)


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(3, 100, (batch, length), generator=generator)


# -- in the graph's own memory -------------------------------------------------------------------


def test_a_static_cache_stays_in_the_graph(llama: PreTrainedModel, static: Exported) -> None:
    assert static.report.num_right == len(static.report.verdicts) > 5
    assert static.shapes.summary()["input_ids"] == (2, "query")
    assert not any(name.startswith("past") for name in static.shapes.summary())
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        whole = llama(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    first = static(ids[:, :7], mask[:, :7])
    held = first.past_key_values
    assert isinstance(held, HeldCache)
    assert held.num_tokens == 7
    second = static(ids[:, 7:10], mask[:, :10], held)
    assert second.past_key_values is held
    torch.testing.assert_close(second.logits, whole.logits[:, 7:10], rtol=0, atol=1e-5)
    held.crop(-2)  # taken back, then other tokens in their place
    third = static(ids[:, 8:], mask, held)
    torch.testing.assert_close(third.logits, whole.logits[:, 8:], rtol=0, atol=1e-5)


def test_handles_of_what_was_written_over_are_refused(
    llama: PreTrainedModel, static: Exported
) -> None:
    ids = tokens(2, 5)
    held = static(ids).past_key_values
    static(ids)
    with pytest.raises(ExportError, match="no longer in the graph's memory"):
        static(ids[:, :1], None, held)
    held = static(ids).past_key_values
    static.runner().generate(ids, max_new_tokens=3)
    with pytest.raises(ExportError, match="no longer in the graph's memory"):
        static(ids[:, :1], None, held)
    with pytest.raises(ExportError, match="kept inside the graph"):
        static(ids, None, DynamicCache(config=llama.config))
    held = static(ids).past_key_values
    with pytest.raises(ExportError, match="expected 0 to -5"):
        held.crop(-6)
    with pytest.raises(ExportError, match="takes 1 to 40"):
        static(tokens(2, 36), None, held)
    with pytest.raises(ExportError, match="takes 2 only"):
        static(tokens(3, 4))
    assert static(ids[:, :1], None, held).past_key_values.num_tokens == 6  # a refusal costs nothing


def test_a_static_cache_generates(llama: PreTrainedModel, static: Exported) -> None:
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = llama.generate(
        ids, attention_mask=mask, max_new_tokens=34, min_new_tokens=34, do_sample=False
    )
    assert torch.equal(static.runner().generate(ids, mask, 34), expected)
    with pytest.raises(ExportError, match="takes 1 to 40"):
        static.runner().generate(ids, mask, 36)


def test_what_runs_beside_a_generation_is_refused_not_mixed(static: Exported) -> None:
    ids = tokens(2, 5)
    run = static.runner()
    with pytest.raises(ExportError, match="no longer in the graph's memory"):
        run.generate(ids, max_new_tokens=6, on_token=lambda _: static(ids.flip(1)))
    expected = run.generate(ids, max_new_tokens=6)
    assert torch.equal(run.generate(ids, max_new_tokens=6), expected)


@pytest.mark.parametrize("name", ["mistral", "bart"])
def test_static_windows_and_encoders(name: str) -> None:
    exported = mnemon.export_model(build(name), cache="static(30)")
    assert not exported.report.refused
    assert not exported.report.wrong


def test_static_wants_a_fixed_batch_and_room(llama: PreTrainedModel) -> None:
    with pytest.raises(ExportError, match="pin it to one number"):
        mnemon.export_model(llama, cache="static(40)", ranges={"batch": (1, 4)})
    with pytest.raises(ExportError, match="at least 8 are needed"):
        mnemon.export_model(llama, cache="static(3)")


# -- in few bits ---------------------------------------------------------------------------------


def test_packed_in_a_graph_is_packed_outside(llama: PreTrainedModel, packed: Exported) -> None:
    assert packed.report.num_right == len(packed.report.verdicts)
    assert any("64*blocks" in str(axis) for axis in packed.shapes.summary()["attention_mask"])
    ids = tokens(2, 200)
    outside = mnemon.Cache(llama.config, "int4")
    with torch.no_grad():
        llama(ids[:, :150], position_ids=torch.arange(150)[None], past_key_values=outside)
        expected = llama(
            ids[:, 150:], position_ids=torch.arange(150, 200)[None], past_key_values=outside
        ).logits
    inside = packed(ids[:, :150]).past_key_values
    assert isinstance(inside, mnemon.Cache)
    found = packed(ids[:, 150:], None, inside)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-4)
    assert inside.nbytes == outside.nbytes
    for mine, other in zip(inside.layers, outside.layers, strict=True):
        theirs = other.state().tensors
        for name, tensor in mine.state().tensors.items():
            if name.endswith("_blocks"):  # a rounding may fall to the other side, seldom
                assert (tensor != theirs[name]).float().mean() < 0.002
    # And the other way: what was cached outside goes on inside.
    with torch.no_grad():
        whole = mnemon.Cache(llama.config, "int4")
        llama(ids[:, :190], position_ids=torch.arange(190)[None], past_key_values=whole)
    mixed = packed(ids[:, 190:], None, whole)
    torch.testing.assert_close(mixed.logits, expected[:, 40:], rtol=0, atol=2e-2)


def test_packed_exports_take_their_own_recipe_alone(
    llama: PreTrainedModel, packed: Exported
) -> None:
    ids = tokens(1, 5)
    for cache, message in (
        (mnemon.Cache(llama.config), "the export keeps int4"),
        (mnemon.Cache(llama.config, "int8"), "the export keeps int4"),
        (DynamicCache(config=llama.config), "mnemon.Cache of that recipe alone"),
    ):
        with pytest.raises(ExportError, match=message):
            packed(ids, None, cache)


def test_numbers_that_are_not_finite_do_not_get_lost(packed: Exported) -> None:
    part = packed.form.layers[0][0]
    tensors = packed.form.empty(1, torch.float32, "cpu", 130)[:8]
    keys = torch.zeros(1, 2, 64, 16)
    keys[0, 0, 3, 2] = torch.nan
    graph: Any = part.in_graph(tensors, 0)
    with torch.no_grad(), _compiling():
        graph.append(keys, torch.zeros_like(keys))
        graph.append(torch.zeros_like(keys), torch.zeros_like(keys))  # the first ones are packed
    assert torch.isnan(graph.held()[2]).any()  # the block's factor: its numbers are, too
    layer = mnemon.Cache(packed.config, "int4").layers[0]
    with pytest.raises(ExportError, match="not finite"):
        part.write(layer, graph.held(), 258)


class _compiling:
    """As `torch.compiler.is_compiling` sees a trace."""

    def __enter__(self) -> None:
        self._before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = True

    def __exit__(self, *exception: object) -> None:
        torch.compiler._is_compiling_flag = self._before


# -- states --------------------------------------------------------------------------------------


def test_states_go_token_by_token(jamba: tuple[PreTrainedModel, Exported]) -> None:
    model, exported = jamba
    assert exported.shapes.summary()["input_ids"] == ("batch", 1)
    assert exported.shapes.summary()["past_key_values.0.conv.0"][0] == "batch"
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
    for cache in (None, mnemon.Cache(model.config), DynamicCache(config=model.config)):
        first = exported(ids[:, :6], mask[:, :6], cache)  # six steps
        second = exported(ids[:, 6:], mask, first.past_key_values)
        assert second.past_key_values.get_seq_length() == 9
        torch.testing.assert_close(second.logits, whole[:, 6:], rtol=0, atol=1e-5)
        with torch.no_grad():  # the model itself goes on from there
            more = model(
                ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1),
                past_key_values=second.past_key_values,
            ).logits  # fmt: skip
            again = model(
                torch.cat([ids, ids[:, :1]], 1), attention_mask=torch.cat([mask, mask[:, -1:]], 1)
            ).logits
        torch.testing.assert_close(more[:, 0], again[:, -1], rtol=0, atol=1e-5)


def test_states_take_prompts_as_samples_and_keep_bounds(
    jamba: tuple[PreTrainedModel, Exported],
) -> None:
    model, _ = jamba
    prompt = {"input_ids": tokens(2, 3), "attention_mask": torch.ones((2, 3), dtype=torch.int64)}
    exported = mnemon.export_model(model, samples=prompt, ranges={"past": (0, 4)}, verify=False)
    assert exported(tokens(1, 5)).past_key_values.get_seq_length() == 5
    with pytest.raises(ExportError, match="takes 0 to 4"):
        exported(tokens(1, 6))


def test_configs_with_infinities_are_read_back(tmp_path: Any) -> None:
    from tests.matrix.architectures import rows

    model, _ = rows()["bamba"].build()
    exported = mnemon.export_model(model.eval(), verify=False)
    ids = tokens(1, 4)
    expected = exported(ids).logits
    again = mnemon.load_export(exported.save(tmp_path / "one"))
    assert torch.equal(again(ids).logits, expected)


def test_states_refuse_more_tokens_per_step(jamba: tuple[PreTrainedModel, Exported]) -> None:
    with pytest.raises(ExportError, match="one token at a time"):
        mnemon.export_model(jamba[0], ranges={"query": 3})


# -- what all have -------------------------------------------------------------------------------


def test_parts_as_json(static: Exported, packed: Exported) -> None:
    for exported in (static, packed, mnemon.export_model(build("mistral"), verify=False)):
        for layer in exported.form.layers:
            for part in layer:
                assert part_from_json(part.to_json()) == part


def test_long_windows_are_compared_with_a_random_past() -> None:
    model = build("mistral")
    model.config.sliding_window = 300
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 300
    exported = mnemon.export_model(model)
    cases = [case for case in grid(exported) if case.made_by == "random"]
    assert {case.past for case in cases} == {299, 300, 601}
    assert not exported.report.wrong
    assert not exported.report.refused


def test_an_export_that_cannot_read_what_it_returned_is_found(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Right on every single call, wrong from the second of its own on."""
    exported = mnemon.export_model(llama, verify=False)
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "import mnemon.export.exported as e\n"
        "real = e.Exported.feed\n"
        "seen = {}\n"
        "def feed(self, ids, mask, past, *rest):\n"
        "    own = any(id(one) in seen for one in past)\n"
        "    past = [one * 1.5 if own else one for one in past]\n"
        "    logits, held = real(self, ids, mask, past, *rest)\n"
        "    seen.update((id(one), one) for one in held)\n"
        "    return logits, held\n"
        "e.Exported.feed = feed\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = verify(llama, exported)
    assert report.wrong
    assert {one.case.made_by for one in report.wrong} == {"export"}


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_a_choice_in_the_graph(bias: bool) -> None:
    layer = torch.nn.Linear(24, 40, bias=bias)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with torch.no_grad(), few_rows():
        program = torch.export.export(
            layer, (torch.randn(2, 3, 24),), dynamic_shapes=dynamic, strict=False
        )
    assert "cond" in program.graph_module.code
    for rows in ((1, 2), (2, 2), (1, 5), (4, 9), (2, 8)):
        x = torch.randn(*rows, 24)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)
