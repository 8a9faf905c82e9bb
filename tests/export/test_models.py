"""Every architecture and target against the model: a grid of shapes, and 64 greedy tokens."""

from pathlib import Path

import pytest
import torch
from tests.export.tiny import MAKERS, build

import mnemon
from mnemon.export import Exported

FAST = {
    "program": {"llama", "gemma3", "t5", "jamba"},
    "onnx": {"gemma3", "bart"},
    "aoti": {"llama"},
}
CASES = [
    pytest.param(to, name, marks=() if name in FAST[to] else pytest.mark.exports, id=f"{name}-{to}")
    for to in FAST
    for name in MAKERS
]


@pytest.mark.parametrize(("to", "name"), CASES)
def test_every_shape_and_64_tokens(to: str, name: str, tmp_path: Path) -> None:
    model = build(name)
    exported = mnemon.export_model(model, to=to)
    assert isinstance(exported, Exported)
    report = exported.report
    assert not report.wrong
    assert not report.refused, str(report)
    tried = {(one.case.batch, one.case.past, one.case.query) for one in report.verdicts}
    queries = (1,) if name == "jamba" else (1, 3)
    assert tried >= {(b, p, q) for b in (1, 2, 3) for p in (0, 1, 6, 7) for q in queries}
    assert any(one.case.strided for one in report.verdicts)
    assert any(one.case.made_by == "export" for one in report.verdicts)
    assert report.largest_difference < 1e-5

    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    if model.config.is_encoder_decoder:  # an encoder's input is padded on the right
        mask = mask.flip(1)
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    assert torch.equal(exported.runner().generate(ids, mask, 64), expected)

    again = mnemon.load_export(exported.save(tmp_path / "saved"))  # also its config is read back
    whole = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = model(ids, **whole).logits
    source = {"encoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    first = again(ids[:, :5], None, None, **source)
    second = again(ids[:, 5:], None, first.past_key_values)
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], 1), logits, rtol=0, atol=1e-4
    )
