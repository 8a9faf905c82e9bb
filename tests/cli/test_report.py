"""report.html: self-contained, well-formed, escaped, and true to the figures it was given."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mnemon.cli import charts, report
from mnemon.cli.demo_result import DemoResult, FedTwice, Reuse, Row, SpeedPoint
from mnemon.cli.wording import percent

NAMES = (
    ("DynamicCache", "transformers", 40.0),
    ("StaticCache", "transformers", 55.0),
    ("QuantizedCache fp8", "transformers", 30.0),
    ("dense", "mnemon", 44.0),
    ("dense + attach", "mnemon", 90.0),
    ("static", "mnemon", 56.0),
    ("static + attach", "mnemon", 92.0),
)
VOID = {"meta", "br", "img", "hr", "input", "link"}


def make_result(**changes: Any) -> DemoResult:
    """A result with seven caches, one of which is lossy."""
    rows = [
        Row(
            name=name,
            library=library,
            tokens_per_s=speed,
            first_token_s=0.9,
            bytes_per_token=1536 if "fp8" in name else 3072,
            held_bytes=7_000_000,
            peak_bytes=9_000_000,
            agreement=0.5 if "fp8" in name else 1.0,
            logit_difference=0.11 if "fp8" in name else 0.0,
            bits_per_byte=1.234,
            tokens=[1, 2, 9] if "fp8" in name else [1, 2, 3],
            text="def parse(<x>)" if "fp8" in name else "def parse(self)",
            recall={16: 1.0, 256: 0.9, 1024: 0.4 if "fp8" in name else 0.8},
        )
        for name, library, speed in NAMES
    ]
    speed = [
        SpeedPoint(
            name=row.name, context=n, tokens_per_s=row.tokens_per_s / n**0.2, first_token_s=1
        )
        for i, row in enumerate(rows)
        for n in (256, 1024, 2048, 4032)
    ]
    reuse = Reuse(
        num_prompt=2080,
        num_shared=2048,
        num_reused=2048,
        fresh_s=[1.0, 0.9, 1.1],
        kept_s=[0.02, 0.02, 0.03],
        loaded_s=[0.03, 0.025, 0.04],
        file_bytes=6_300_000,
        save_s=0.01,
        same_tokens=True,
    )
    twice = {"num_prompt": 32, "num_prompts": 4, "num_right": 43, "right_text": "x = 1"}
    result = DemoResult(
        model={
            "name": "tiny-stdlib",
            "architecture": "LlamaForCausalLM",
            "parameters": 6_700_000,
            "layers": 6,
            "kv_heads": 4,
            "head_dim": 32,
            "dtype": "bfloat16",
            "device": "cpu",
        },
        source={"name": "mnemon's own source", "tokens": 90_000, "characters": 300_000},
        settings={
            "context": 2048,
            "new_tokens": 64,
            "rounds": 3,
            "scored_tokens": 256,
            "recall_samples": 8,
            "limit": 4096,
        },
        environment={"date": "2026-01-02 03:04 UTC", "command": "mnemon demo", "torch": "2.13.0"},
        rows=rows,
        speed=speed,
        reuse=reuse,
        fed_twice=[
            FedTwice(name="DynamicCache", num_held=75, text="y", num_same=1, **twice),
            FedTwice(name="dense + attach", num_held=43, text="x = 1", num_same=4, **twice),
        ],
        prompt_end="# mnemon/cache.py",
        notes=[],
        elapsed_s=88.0,
    )
    return dataclasses.replace(result, **changes)


class _Checker(HTMLParser):
    """Collects the text and fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> _Checker:
    checker = _Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_page_is_well_formed_and_loads_nothing() -> None:
    html = report.render(make_result())
    checker = parsed(html)
    assert {name for name, _ in checker.attributes} & {"src", "href"} == set()
    assert "<script" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert len(html) < 200_000


def test_page_shows_the_figures() -> None:
    text = " ".join("".join(parsed(report.render(make_result())).text).split())
    for name, _, speed in NAMES:
        assert name in text
        assert f"{speed:.1f}" in text
    assert "2.2\u00d7" in text  # 90 against 40 tokens/s
    assert "33\u00d7" in text  # 1.0 s computed, 0.03 s loaded
    assert "3 of 4" not in text
    assert "4 of 4" in text
    assert "1 of 4 answers right, without an error; 75 tokens held where 43 are right" in text
    assert "2026-01-02 03:04 UTC" in text


def test_a_slower_cache_is_not_praised() -> None:
    result = make_result()
    for row in result.rows:
        row.tokens_per_s = 50.0 if row.library == "transformers" else 25.0
    text = "".join(parsed(report.render(result)).text)
    assert "0.5\u00d7" in text


def test_text_is_escaped() -> None:
    result = make_result()
    result.rows[0].text = result.rows[3].text = "<script>alert(1)</script>"
    html = report.render(result)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_where_a_text_leaves_the_reference_is_marked() -> None:
    html = report.render(make_result())
    assert "<mark>&lt;x&gt;)</mark>" in html


def test_failed_cache_and_missing_parts_are_said() -> None:
    result = make_result(reuse=None, fed_twice=[], notes=["The context was shortened."])
    result.rows[2] = Row(name="QuantizedCache fp8", library="transformers", error="ValueError: no")
    for row in result.rows:
        row.recall = {}
        row.peak_bytes = None
    text = "".join(parsed(report.render(result)).text)
    assert "not with this model: ValueError: no" in text
    assert "The context was shortened." in text
    assert "computed once" not in text
    assert "still remembered" not in text


def test_one_context_is_drawn_as_bars() -> None:
    result = make_result()
    result = dataclasses.replace(result, speed=[p for p in result.speed if p.context == 2048])
    html = report.render(result)
    parsed(html)
    assert html.count("tokens of context</text>") == 0
    assert f"{result.speed[0].tokens_per_s:.1f} tokens/s" in html


def test_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    path = report.write(make_result(), folder)
    report.write(make_result(elapsed_s=1.0), folder)
    assert [each.name for each in folder.iterdir()] == ["report.html"]
    assert "1 s" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100%"), (0.0, "0%"), (0.99999, "99.9%"), (0.5, "50%"), (0.00001, "0.1%")],
)
def test_percent_rounds_to_the_ends_only_when_there(share: float, text: str) -> None:
    assert percent(share) == text


def test_line_chart_is_valid_svg_with_every_point() -> None:
    series = [
        charts.Series(name="a & b", points=((128.0, 5.0), (4096.0, 2.0)), colour=0),
        charts.Series(name="one", points=((512.0, 1.0),), colour=9, dashed=True),
    ]
    html = str(charts.lines(series, x_label="tokens", y_label="speed"))
    drawings = re.findall(r"<svg.*?</svg>", html)
    assert len(drawings) == 2
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        dots = root.findall("circle")
        assert len(dots) == 3
        for dot in dots:
            assert 0 <= float(dot.attrib["cx"]) <= width
            assert 0 <= float(dot.attrib["cy"]) <= height
        # a faster point lies higher
        assert float(dots[0].attrib["cy"]) < float(dots[1].attrib["cy"])


@pytest.mark.parametrize("points", [((64.0, 0.0),), ((64.0, 1e-6), (65.0, 2e-6)), ((1.0, 1e6),)])
def test_line_chart_of_odd_values(points: tuple[tuple[float, float], ...]) -> None:
    html = str(
        charts.lines([charts.Series(name="x", points=points, colour=0)], x_label="", y_label="")
    )
    assert "nan" not in html


def test_equal_lines_are_merged() -> None:
    same = ((1.0, 1.0), (2.0, 0.5))
    series = [charts.Series(name=name, points=same, colour=i) for i, name in enumerate("abc")]
    assert [line.name for line in charts.merge_equal(series)] == ["all 3 caches"]
    other = charts.Series(name="d", points=((1.0, 0.0),), colour=3)
    assert [line.name for line in charts.merge_equal([*series, other])] == ["a, b, c", "d"]


def test_bars_share_a_scale_and_escape() -> None:
    html = str(
        charts.bars(
            [
                charts.Bar(name="<a>", value=10, text="ten", colour=0),
                charts.Bar(name="b", value=5, text="five", colour=1),
            ]
        )
    )
    assert "&lt;a&gt;" in html
    assert re.findall(r"width:([\d.]+)%", html) == ["100.00", "50.00"]
