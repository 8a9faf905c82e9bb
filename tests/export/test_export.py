"""What an export is, apart from its numbers: shapes, calls, files, errors, and no trace left."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.tiny import WINDOW, build
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import mnemon
from mnemon.errors import ExportError, RecipeError
from mnemon.export import Exported, tracing
from mnemon.export.report import Case, Report, Verdict
from mnemon.export.verify import verify
from mnemon.recipe import parse


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def program(llama: PreTrainedModel) -> Exported:
    return mnemon.export_model(llama, verify=False)


@pytest.fixture(scope="module")
def mistral() -> Exported:
    return mnemon.export_model(build("mistral"), verify=False)


def sample(model: PreTrainedModel, batch: int, past: int, query: int) -> dict[str, Any]:
    cache = DynamicCache(config=model.config)
    ids = torch.ones((batch, past + query), dtype=torch.int64)
    with torch.no_grad():
        model(ids[:, :past], past_key_values=cache)
    return {
        "input_ids": ids[:, past:],
        "attention_mask": torch.ones_like(ids),
        "past_key_values": cache,
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_zero_one_or_two_samples_give_the_same_shapes(name: str) -> None:
    model = build(name)
    form = tracing.read_form(model, parse(""))
    one, two = sample(model, 1, 5, 1), sample(model, 2, 4, 3)
    found = [
        tracing.plan_shapes(model, form, given, None)[0].summary()
        for given in ([], [one], [one, two])
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["attention_mask"] == ("batch", "past + query")
    assert found[0]["input_ids"] == ("batch", "query")
    assert found[0]["past_key_values.1.value"] == ("batch", 2, "past", 16)


def test_tracing_is_on_an_inflated_sample(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = torch.export.export

    def spy(module: Any, args: Any, **options: Any) -> Any:
        seen.append([tensor.clone() for tensor in args])
        return real(module, args, **options)

    monkeypatch.setattr(torch.export, "export", spy)
    mnemon.export_model(llama, samples=sample(llama, 1, 5, 1), verify=False)
    ids, *past, mask = seen[0]
    sizes = {ids.shape[0], ids.shape[1], past[0].shape[2], mask.shape[1]}
    assert len(sizes) == 4
    assert min(sizes) >= 2
    assert int(mask[0, 0]) == 0
    assert all(tensor.is_contiguous() for tensor in past)


def test_calls_take_and_return_caches(llama: PreTrainedModel, program: Exported) -> None:
    ids = torch.randint(100, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        whole = llama(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for cache in (None, mnemon.Cache(llama.config), DynamicCache(config=llama.config)):
        first = program(ids[:, :5], mask[:, :5], cache)
        second = program(ids[:, 5:], mask, first.past_key_values)
        expected = mnemon.Cache if cache is None else type(cache)
        assert type(second.past_key_values) is expected
        assert second.past_key_values.get_seq_length() == 8
        torch.testing.assert_close(second.logits, whole.logits[:, 5:], rtol=0, atol=1e-5)


def test_a_mask_that_was_all_ones_still_counts(llama: PreTrainedModel) -> None:
    exported = mnemon.export_model(llama, samples=sample(llama, 2, 5, 3), verify=False)
    ids = torch.randint(100, (2, 6))
    mask = torch.ones_like(ids)
    plain = exported(ids, mask).logits
    mask[0, :3] = 0
    padded = exported(ids, mask).logits
    assert (plain[0, -1] - padded[0, -1]).abs().max() > 1e-3
    alone = exported(ids[:1, 3:]).logits
    torch.testing.assert_close(padded[:1, 3:], alone, rtol=0, atol=1e-5)


def test_tensors_that_do_not_lie_whole_are_copied(
    llama: PreTrainedModel, program: Exported
) -> None:
    ids = torch.randint(100, (1, 7))
    expected = program(ids[:, 6:], None, program(ids[:, :6]).past_key_values).logits
    cache = DynamicCache(config=llama.config)
    program(ids[:, :6], None, cache)
    for layer in cache.layers:
        layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)
        layer.values = torch.stack([layer.values, layer.values], -1)[..., 0]
        assert not layer.keys.is_contiguous()
    assert torch.equal(program(ids[:, 6:], None, cache).logits, expected)


def test_three_windows(mistral: Exported) -> None:
    model = build("mistral")
    ids = torch.randint(3, 100, (2, 4))
    new = 3 * WINDOW
    expected = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert torch.equal(mistral.runner().generate(ids, max_new_tokens=new), expected)
    cache = None
    for token in expected[:, : 3 * WINDOW].split(1, dim=1):
        cache = mistral(token, None, cache).past_key_values
    assert cache.num_tokens == 3 * WINDOW
    assert all(layer.num_stored <= WINDOW - 1 for layer in cache.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (torch.ones((2, 3), dtype=torch.int64), torch.ones((1, 3))), "both are 'batch'"),
        (lambda: (torch.ones((2, 3), dtype=torch.int64), torch.ones((2, 4))), "the 3 new ones"),
        (lambda: (torch.ones((3,), dtype=torch.int64), torch.ones((1, 3))), "2 axes were expected"),
        (lambda: (torch.ones((2, 0), dtype=torch.int64), torch.ones((2, 0))), "it takes 1 to any"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    program: Exported, arguments: Any, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        program(*arguments())


def test_pinned_and_bounded_axes(llama: PreTrainedModel) -> None:
    exported = mnemon.export_model(llama, ranges={"batch": 1, "past": (0, 7)})
    assert {one.case.batch for one in exported.report.verdicts} == {1}
    with pytest.raises(ExportError, match="takes 1 only"):
        exported(torch.ones((2, 3), dtype=torch.int64))
    cache = exported(torch.ones((1, 8), dtype=torch.int64)).past_key_values
    with pytest.raises(ExportError, match="takes 0 to 7"):
        exported(torch.ones((1, 1), dtype=torch.int64), None, cache)


def test_half_precision() -> None:
    model = build("llama").to(torch.bfloat16)
    exported = mnemon.export_model(model)
    assert not exported.report.wrong
    assert exported(torch.ones((1, 3), dtype=torch.int64)).logits.dtype == torch.bfloat16
    with pytest.raises(ExportError, match="bfloat16"):
        mnemon.export_model(model, to="onnx")


def test_save_and_load_in_a_fresh_process(program: Exported, tmp_path: Path) -> None:
    ids = torch.randint(3, 100, (2, 5))
    expected = program.runner().generate(ids, max_new_tokens=8).tolist()
    folder = program.save(tmp_path / "one")
    with pytest.raises(ExportError, match="exists already"):
        program.save(folder)
    code = (
        "import sys, json, pickle, torch, mnemon, mnemon.export, torch._dynamo\n"
        "def no(*a, **k): raise AssertionError('unpickled')\n"
        "class Unpickler(pickle.Unpickler): load = no\n"
        "pickle.load, pickle.loads, pickle.Unpickler = no, no, Unpickler\n"
        f"run = mnemon.load_export({str(folder)!r}).runner()\n"
        f"print(json.dumps(run.generate(torch.tensor({ids.tolist()}), max_new_tokens=8).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_damaged_folders(program: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no export"):
        mnemon.load_export(tmp_path)
    folder = program.save(tmp_path / "one")
    graph = folder / "decoder.pt2"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(bytes(data))
    with pytest.raises(ExportError, match="digest differs"):
        mnemon.load_export(folder)
    graph.unlink()
    with pytest.raises(ExportError, match="lacks decoder"):
        mnemon.load_export(folder)
    manifest = folder / "mnemon_export.json"
    facts = json.loads(manifest.read_text())
    for change, message in (
        ({"files": facts["files"] | {"../x": "0"}}, "outside its folder"),
        ({"version": 99}, "Export again"),
        ({"format": "x"}, "not the manifest"),
        ({"form": None}, "damaged"),
    ):
        manifest.write_text(json.dumps(facts | change))
        with pytest.raises(ExportError, match=message):
            mnemon.load_export(folder)
    manifest.write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        mnemon.load_export(folder)


def test_nothing_remains(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> Any:
        configs = [
            dict(part.config.__dict__) for part in llama.modules() if hasattr(part, "config")
        ]
        return (
            dict(AttentionInterface._global_mapping),
            dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping),
            [list(vars(part)) for part in llama.modules()],
            [part.training for part in llama.modules()],
            configs,
            dict(torch.utils._pytree.SUPPORTED_NODES),
        )

    llama.train()
    before = state()
    mnemon.export_model(llama, verify=False)
    assert state() == before

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(ExportError, match="cannot be traced"):
        mnemon.export_model(llama, verify=False)
    assert state() == before
    llama.eval()


def test_a_wrong_export_is_an_error(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnemon.hf import exporting

    real = exporting.graph_attention

    def off(*args: Any, **kwargs: Any) -> Any:
        out, weights = real(*args, **kwargs)
        return out * 1.01, weights

    monkeypatch.setattr(exporting, "graph_attention", off)
    with pytest.raises(ExportError, match="does not give the model's numbers"):
        mnemon.export_model(llama)


def test_a_crash_is_noted_and_the_rest_goes_on(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The child dies on one shape; the shapes before and after it are still answered."""
    exported = mnemon.export_model(llama, verify=False)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, torch\n"
        "import mnemon.export.exported as e\n"
        "real = e.Exported.step\n"
        "def step(self, ids, mask, *rest):\n"
        "    if ids.shape == (2, 3) and mask.shape[1] == 4: os.abort()\n"
        "    return real(self, ids, mask, *rest)\n"
        "e.Exported.step = step\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = verify(llama, exported)
    (crash,) = report.refused
    assert crash.case == Case(batch=2, past=1, query=3)
    assert crash.status == "crashed"
    assert report.num_right == len(report.verdicts) - 1


def test_out_of_time(llama: PreTrainedModel, program: Exported) -> None:
    report = verify(llama, program, timeout_s=0.001)
    assert {one.status for one in report.verdicts} == {"late"}


def test_reports_show_what_is_not_right() -> None:
    case = Case(batch=2, past=1, query=3)
    report = Report(
        (
            Verdict(case=case, status="right", logits=1e-7),
            Verdict(case=case, status="refused", reason="no"),
            Verdict(case=case, status="wrong", logits=0.5),
        )
    )
    assert report.largest_difference == 0.5
    assert "1 of 3" in str(report)
    assert "refused: batch 2, past 1, query 3: no" in str(report)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_recipes_without_a_graph_form(llama: PreTrainedModel) -> None:
    with pytest.raises(ExportError, match="no form in a graph"):
        mnemon.export_model(llama, cache="host")
    with pytest.raises(ExportError, match="keep nothing between two calls"):
        mnemon.export_model(llama, to="onnx", cache="static(64)")
    with pytest.raises(ExportError, match="do not read float8"):
        mnemon.export_model(llama, to="onnx", cache="fp8")
    with pytest.raises(ExportError, match="packed windows have no form"):
        mnemon.export_model(build("mistral"), cache="int4")


def test_wrong_arguments(llama: PreTrainedModel) -> None:
    with pytest.raises(ExportError, match="known are program, onnx, aoti"):
        mnemon.export_model(llama, to="tflite")
    with pytest.raises(RecipeError):
        mnemon.export_model(llama, cache="nothing(3)")
    with pytest.raises(ExportError, match="does not take"):
        mnemon.export_model(llama, samples={"pixels": torch.ones(1, 1)})
    flash = build("llama")
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ExportError, match="flash_attention_2"):
        mnemon.export_model(flash)


def test_given_positions_are_an_input(llama: PreTrainedModel) -> None:
    given = sample(llama, 2, 5, 3) | {"position_ids": torch.arange(5, 8).expand(2, -1)}
    exported = mnemon.export_model(llama, samples=given)
    assert exported.shapes.summary()["position_ids"] == ("batch", "query")
    ids = torch.randint(3, 100, (2, 5))
    expected = llama.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(exported.runner().generate(ids, max_new_tokens=6), expected)
    with pytest.raises(ExportError, match=r"missing: \['position_ids'\]"):
        exported(ids)


def test_sampling_and_stops(program: Exported) -> None:
    ids = torch.randint(3, 100, (2, 5))
    run = program.runner()

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        out = run.generate(
            ids, max_new_tokens=6, do_sample=True, top_k=20, top_p=0.9, generator=generator
        )
        return [[int(token) for token in row] for row in out]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    greedy = run.generate(ids, max_new_tokens=6)
    stop = int(greedy[0, 6])
    stopped = run.generate(ids, max_new_tokens=6, eos_token_id=stop, pad_token_id=99)
    row = stopped[0, 5:].tolist()
    assert row[: row.index(stop) + 1] == greedy[0, 5 : 5 + row.index(stop) + 1].tolist()
    assert set(row[row.index(stop) + 1 :]) <= {99}


def test_a_cache_made_without_a_config(llama: PreTrainedModel, program: Exported) -> None:
    ids = torch.randint(100, (1, 7))
    cache = DynamicCache()
    program(ids[:, :5], None, cache)
    found = program(ids[:, 5:], None, cache).logits
    with torch.no_grad():
        expected = llama(ids).logits[:, 5:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_windows_want_a_cache_that_knows_them(mistral: Exported) -> None:
    model = build("mistral")
    ids = torch.randint(100, (1, 14))
    with torch.no_grad():
        whole = model(ids).logits
    cache = DynamicCache()
    mistral(ids[:, :10], None, cache)
    for index in range(10, 14):
        found = mistral(ids[:, index : index + 1], None, cache).logits
        torch.testing.assert_close(found[:, 0], whole[:, index], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 14
    blind = DynamicCache()
    with torch.no_grad():
        model(ids[:, :10], past_key_values=blind)
    with pytest.raises(ExportError, match="made without a config"):
        mistral(ids[:, 10:11], None, blind)


def test_other_caches_are_refused(llama: PreTrainedModel, program: Exported) -> None:
    from transformers import EncoderDecoderCache, StaticCache

    ids = torch.ones((1, 3), dtype=torch.int64)
    for cache, message in (
        (StaticCache(llama.config, max_cache_len=8), "StaticCache came"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache came"),
        (mnemon.Cache(llama.config, "int4"), "the export keeps dense"),
        (mnemon.Cache(llama.config, "host"), "no form in a graph"),
        (mnemon.Cache(build("bart").config), "of another model"),
    ):
        with pytest.raises(ExportError, match=message):
            program(ids, None, cache)


def test_masks_cover_what_was_seen(mistral: Exported) -> None:
    cache = mistral(torch.ones((1, 2), dtype=torch.int64)).past_key_values
    with pytest.raises(ExportError, match="the 2 tokens of the cache and the 1 new"):
        mistral(torch.ones((1, 1), dtype=torch.int64), torch.ones((1, 9)), cache)


def test_pinned_axes_are_part_of_sums(llama: PreTrainedModel) -> None:
    exported = mnemon.export_model(llama, ranges={"query": 1, "past": (0, 7)}, verify=False)
    past = exported.form.empty(1, torch.float32, "cpu")
    with pytest.raises(ExportError, match="is 1 here"):
        exported.check(torch.ones((1, 1)), torch.ones((1, 4)), past)


def test_a_bound_holds_for_every_token(llama: PreTrainedModel) -> None:
    run = mnemon.export_model(llama, ranges={"past": (0, 7)}, verify=False).runner()
    ids = torch.ones((1, 4), dtype=torch.int64)
    assert run.generate(ids, max_new_tokens=5).shape == (1, 9)
    with pytest.raises(ExportError, match="takes 0 to 7"):
        run.generate(ids, max_new_tokens=6)
    with pytest.raises(ExportError, match="pad prompts on the left"):
        run.generate(ids, torch.tensor([[1, 1, 1, 0]]))


def test_positions_end() -> None:
    exported = mnemon.export_model(build("gpt2"), verify=False)
    with pytest.raises(ExportError, match="the model has 256 positions"):
        exported(torch.ones((1, 257), dtype=torch.int64))


def test_the_source_of_a_pair() -> None:
    model = build("bart")
    exported = mnemon.export_model(model, verify=False)
    source = torch.randint(3, 100, (2, 6))
    mask = torch.ones_like(source)
    mask[0, 4:] = 0
    ids = torch.randint(3, 100, (2, 4))
    with torch.no_grad():
        whole = model(
            input_ids=source, attention_mask=mask, decoder_input_ids=ids, use_cache=False
        ).logits
    first = exported(ids[:, :3], encoder_input_ids=source, encoder_attention_mask=mask)
    second = exported(ids[:, 3:], None, first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 3:], rtol=0, atol=1e-5)
    with pytest.raises(ExportError, match="holds an encoded source already"):
        exported(ids[:, 3:], None, first.past_key_values, encoder_input_ids=source)
    with pytest.raises(ExportError, match="the first call needs encoder_input_ids"):
        exported(ids)


def test_hostile_manifests(program: Exported, tmp_path: Path) -> None:
    folder = program.save(tmp_path / "one")
    manifest = folder / "mnemon_export.json"
    facts = json.loads(manifest.read_text())
    part = facts["parts"][0]
    for change in (
        {"parts": [part | {"name": "../evil"}], "files": {}},
        {"files": {}},
        {"files": []},
        {"files": None},
        {"generation": None},
        {"dtype": "save"},
        {"dtype": "zz"},
        {"parts": []},
    ):
        manifest.write_text(json.dumps(facts | change))
        with pytest.raises(ExportError):
            mnemon.load_export(folder)


def test_options_of_generation_that_a_runner_does_not_serve(llama: PreTrainedModel) -> None:
    model = build("llama")
    model.generation_config.repetition_penalty = 1.2
    exported = mnemon.export_model(model, verify=False)
    with pytest.warns(UserWarning, match="repetition_penalty"):
        exported.runner()


def test_opset_is_had_or_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ExportError, match="opset is of ONNX"):
        mnemon.export_model(llama, opset=20)
    with pytest.raises(ExportError, match="opset=5 cannot be had"):
        mnemon.export_model(llama, to="onnx", opset=5, verify=False)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, -1]]), "ids are 0 to 99"),
        (torch.tensor([[100, 1]]), "ids are 0 to 99"),
        (torch.tensor([[1.5, 2.0]]), "whole numbers"),
        (torch.tensor([[True, False]]), "whole numbers"),
    ],
)
def test_ids_that_are_none(program: Exported, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        program(ids)
    with pytest.raises(ExportError, match=message):
        program.runner().generate(ids, max_new_tokens=1)


def test_any_number_but_0_is_a_token_in_a_mask(program: Exported) -> None:
    ids = torch.randint(100, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = program(ids, mask).logits
    for other in (mask * 2, mask * 0.5, mask.bool(), mask * -1):
        assert torch.equal(program(ids, other).logits, expected)


def test_rows_of_a_source_that_moved() -> None:
    model = build("bart")
    exported = mnemon.export_model(model, verify=False)
    source = torch.randint(3, 100, (2, 6))
    mask = torch.ones_like(source)
    mask[0, 3:] = 0
    ids = torch.randint(3, 100, (2, 5))
    order = torch.tensor([1, 0])
    with torch.no_grad():
        whole = model(
            input_ids=source[order], attention_mask=mask[order], decoder_input_ids=ids[order]
        ).logits
    for cache in (None, mnemon.Cache(model.config)):
        held = exported(
            ids[:, :4], None, cache, encoder_input_ids=source, encoder_attention_mask=mask
        ).past_key_values
        held.batch_select_indices(order)
        with pytest.raises(ExportError, match="rows were moved"):
            exported(ids[order][:, 4:], None, held)
        found = exported(ids[order][:, 4:], None, held, encoder_attention_mask=mask[order])
        torch.testing.assert_close(found.logits, whole[:, 4:], rtol=0, atol=1e-5)


def test_positions_of_the_models_own_are_compared() -> None:
    """RoBERTa numbers its tokens otherwise than a graph can from a mask."""
    from transformers import RobertaConfig, RobertaForCausalLM

    config = RobertaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
    )
    with pytest.raises(ExportError, match="does not give the model's numbers"):
        mnemon.export_model(RobertaForCausalLM(config).eval())


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class OwnConfig(LlamaConfig):
        model_type = "nobody_registered_it"

    model = build("llama")
    own = LlamaForCausalLM(OwnConfig(**model.config.to_diff_dict())).eval()
    exported = mnemon.export_model(own, verify=False)
    ids = torch.ones((1, 3), dtype=torch.int64)
    expected = exported(ids).logits
    again = mnemon.load_export(exported.save(tmp_path / "own"))
    with pytest.raises(ExportError, match="pass a cache of your own"):
        again(ids)
    assert torch.equal(again(ids, None, mnemon.Cache(own.config)).logits, expected)


def test_a_folder_that_is_found_after_a_change_of_directory(
    program: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.save(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    again = mnemon.load_export("one")
    monkeypatch.chdir("/")
    assert again(torch.ones((1, 3), dtype=torch.int64)).logits.shape == (1, 3, 100)


def test_threads_leave_the_model_as_it_was() -> None:
    import threading

    model = build("llama").train()
    threads = [
        threading.Thread(target=lambda: mnemon.export_model(model, verify=False)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(part.training for part in model.modules())


def test_a_runner_draws_as_the_generation_config_says() -> None:
    model = build("llama")
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1  # drawn, and the likeliest all the same
    model.generation_config.temperature = 0.7
    exported = mnemon.export_model(model, verify=False)
    assert exported.manifest.generation["do_sample"] is True
    ids = torch.randint(3, 100, (2, 5))
    run = exported.runner()
    assert torch.equal(
        run.generate(ids, max_new_tokens=5), run.generate(ids, max_new_tokens=5, do_sample=False)
    )
    for wrong in ({"top_k": -1}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(ExportError):
            run.generate(ids, max_new_tokens=2, **wrong)
    for bad, count in ((torch.ones(3, dtype=torch.int64), 2), (ids[:, :0], 2), (ids, 2.5)):
        with pytest.raises(ExportError, match="expected"):
            run.generate(bad, max_new_tokens=count)


@pytest.mark.parametrize(
    ("option", "value"),
    [("exponential_decay_length_penalty", (2, 5.0)), ("guidance_scale", 2.0), ("min_p", 0.1)],
)
def test_options_that_change_tokens_are_warned_of(option: str, value: Any) -> None:
    model = build("llama")
    setattr(model.generation_config, option, value)
    exported = mnemon.export_model(model, verify=False)
    with pytest.warns(UserWarning, match=option):
        exported.runner()


def test_manifests_that_contradict_themselves(program: Exported, tmp_path: Path) -> None:
    folder = program.save(tmp_path / "one")
    manifest = folder / "mnemon_export.json"
    facts = json.loads(manifest.read_text())
    part = facts["parts"][0]
    names = part["inputs"]
    swapped = [names[0], names[2], names[1], *names[3:]]
    first = facts["shapes"][0]
    for change in (
        {"parts": [part | {"inputs": names[:-1]}]},
        {"parts": [part | {"inputs": swapped}]},
        {"max_tokens": "x"},
        {"form": facts["form"] | {"recipe": "static(40)"}},
        {"shapes": [first | {"low": -5}, *facts["shapes"][1:]]},
        {"version": 1},
    ):
        manifest.write_text(json.dumps(facts | change))
        with pytest.raises(ExportError):
            mnemon.load_export(folder)


def test_verifying_against_another_model(program: Exported) -> None:
    with pytest.raises(ExportError, match="of another model"):
        verify(build("gpt2"), program)


def test_bounds_that_the_models_code_adds_are_shown() -> None:
    from tests.matrix.architectures import rows

    model, _ = rows()["xglm"].build()
    exported = mnemon.export_model(model.eval(), verify=False)
    query = exported.shapes.symbols["query"]
    assert query.high is not None
    assert "by the model's code" in query.evidence
    with pytest.raises(ExportError, match="takes 1 to"):
        exported(torch.ones((1, query.high + 1), dtype=torch.int64))
