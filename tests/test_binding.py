"""attach, detach: one instance, completely undone, nothing else disturbed."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

import mnemon
from binding_models import bart, llama, mistral, prompt
from mnemon.errors import CacheError, ModelError


def _snapshot(model: PreTrainedModel) -> list[Any]:
    """What a trace would show in: every module's attributes, and every config."""
    found: list[Any] = []
    for _, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        found.append((id(module), sorted(vars(module)), attributes.get("config")))
        found.append({k: id(v) for k, v in attributes.items()})
    found.append(model.config.to_dict())
    found.append(model.config._attn_implementation)
    found.append([len(module._forward_pre_hooks) for module in model.modules()])
    return found


@pytest.mark.parametrize("make", [llama, mistral, bart])
def test_detach_leaves_no_trace(make: Any) -> None:
    model = make()
    before = _snapshot(model)
    class_before = dict(vars(type(model)))
    mnemon.attach(model)
    assert _snapshot(model) != before
    assert dict(vars(type(model))) == class_before
    mnemon.detach(model)
    assert _snapshot(model) == before


def test_attaching_changes_no_number() -> None:
    model, ids = llama(), prompt(30)
    expected = model(ids, use_cache=False).logits
    with mnemon.attach(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_context_manager_detaches_after_an_exception() -> None:
    model = llama()
    before = _snapshot(model)
    with pytest.raises(ZeroDivisionError), mnemon.attach(model):
        raise ZeroDivisionError
    assert _snapshot(model) == before


def test_context_manager_accepts_a_detach_inside() -> None:
    model = llama()
    with mnemon.attach(model):
        mnemon.detach(model)
    assert "generate" not in vars(model)


def test_attaching_twice_is_an_error() -> None:
    model = llama()
    with mnemon.attach(model):
        with pytest.raises(ModelError, match="attached already"):
            mnemon.attach(model)
        assert model.generate(prompt(4), max_new_tokens=1).shape == (1, 5)


def test_detaching_what_is_not_attached_is_an_error() -> None:
    with pytest.raises(ModelError, match="not attached"):
        mnemon.detach(llama())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_mismatch": "ignore"}, "'crop' or 'error'"),
        ({"chunk": 100}, "power of two"),
        ({"chunk": 0}, "power of two"),
    ],
)
def test_bad_options_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = llama()
    before = _snapshot(model)
    with pytest.raises(ModelError, match=message):
        mnemon.attach(model, **options)
    assert _snapshot(model) == before


def test_only_transformers_models_can_be_attached() -> None:
    with pytest.raises(ModelError, match="PreTrainedModel; got Linear"):
        mnemon.attach(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_detach_refuses_when_somebody_else_replaced_forward() -> None:
    model = llama()
    mnemon.attach(model)
    ours = vars(model)["forward"]
    vars(model)["forward"] = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ModelError, match=r"model\.forward was replaced"):
        mnemon.detach(model)
    vars(model)["forward"] = ours
    mnemon.detach(model)


def test_a_generate_of_the_instance_is_kept_and_put_back() -> None:
    model = llama()
    calls: list[int] = []

    def custom(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(model).generate(model, *args, **kwargs)

    vars(model)["generate"] = custom
    with mnemon.attach(model):
        model.generate(prompt(4), max_new_tokens=2)
    assert calls == [1]
    assert vars(model)["generate"] is custom


def test_two_models_are_independent() -> None:
    one, two = llama(0), llama(1)
    two.config = one.config  # sharing a config object must not couple them
    ids = prompt(12)
    expected = two.generate(ids, max_new_tokens=6, do_sample=False)
    with mnemon.attach(one) as attachment:
        cache = mnemon.Cache(one.config)
        one.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
        assert torch.equal(two.generate(ids, max_new_tokens=6, do_sample=False), expected)
        assert "generate" not in vars(two)
        with mnemon.attach(two) as other:
            two.generate(
                ids, max_new_tokens=6, do_sample=False, past_key_values=mnemon.Cache(two.config)
            )
            assert (attachment.stats.calls, other.stats.calls) == (1, 1)


def test_signatures_that_transformers_reads_are_unchanged() -> None:
    model = llama()
    forward, generate = inspect.signature(model.forward), inspect.signature(model.generate)
    with mnemon.attach(model):
        assert inspect.signature(model.forward) == forward
        assert inspect.signature(model.generate) == generate


def test_state_dict_and_save_pretrained_are_not_disturbed(tmp_path: Any) -> None:
    model = llama()
    keys = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    with mnemon.attach(model):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path / "attached")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_attached_to_itself(how: str) -> None:
    model, ids = llama(), prompt(12)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    attachment = mnemon.attach(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    cache = mnemon.Cache(twin.config)
    zeroed = twin.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert not torch.equal(zeroed, expected)  # the copy's weights, not the original's
    assert attachment.stats.calls == 0
    mnemon.detach(twin)
    assert "forward" not in vars(twin)
    cache = mnemon.Cache(model.config)
    again = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(again, expected)
    mnemon.detach(model)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_works_under(mode: Any) -> None:
    model, ids = llama(), prompt(12)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        with mode():
            got = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
            assert torch.equal(got, expected)
        # what was cached in that mode serves outside of it
        got = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
        assert torch.equal(got, expected)


def test_transformers_own_caches_go_through_untouched() -> None:
    model, ids = llama(), prompt(12)
    expected = DynamicCache(config=model.config)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=expected)
    with mnemon.attach(model) as attachment:
        cache = DynamicCache(config=model.config)
        got = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
        without = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert attachment.stats.calls == 0
    assert torch.equal(got, tokens)
    assert torch.equal(without, tokens)
    assert cache.get_seq_length() == expected.get_seq_length()


def test_forward_is_unchanged_for_training() -> None:
    model, ids = llama().train(), prompt(8)
    with mnemon.attach(model):
        outputs = model(input_ids=ids, labels=ids)
        assert isinstance(outputs, ModelOutput)
        outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_report_says_who_uses_which_attention() -> None:
    model = llama()
    with mnemon.attach(model) as attachment:
        report = attachment.report()
        assert "mnemon's in 2 modules" in report
        assert "on_mismatch='crop'" in report
        assert "attached" in repr(attachment)
    assert "detached" in repr(attachment)
    with mnemon.attach(model, attention=False) as attachment:
        assert "attention: the model's own" in attachment.report()


def test_report_names_what_falls_back_and_why() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    model.model.layers[0].self_attn.config = copy.copy(model.config)
    model.model.layers[0].self_attn.config._attn_implementation_internal = "flex_attention"
    with mnemon.attach(model) as attachment:
        report = attachment.report()
    assert "model.layers.0.self_attn: uses flex_attention" in report


def test_one_cache_serves_one_call_at_a_time() -> None:
    model, ids = llama(), prompt(8)
    cache = mnemon.Cache(model.config)

    def nested(*args: Any) -> bool:
        model.generate(ids, max_new_tokens=2, past_key_values=cache)
        return False

    with mnemon.attach(model):
        with pytest.raises(CacheError, match="in use by another generate call"):
            model.generate(ids, max_new_tokens=4, past_key_values=cache, stopping_criteria=[nested])
        model.generate(ids, max_new_tokens=2, past_key_values=cache)
