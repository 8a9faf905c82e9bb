"""The recipe language: canonical text, clear errors, never code."""

import builtins

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.errors import RecipeError
from mnemon.recipe import MAX_LENGTH, Recipe, available, parse


@pytest.mark.parametrize(
    ("text", "canonical", "tokens"),
    [
        ("", "dense", None),
        (None, "dense", None),
        ("  ", "dense", None),
        ("dense", "dense", None),
        ("DENSE ", "dense", None),
        ("static(4096)", "static(4096)", 4096),
        (" static ( 4k ) ", "static(4096)", 4096),
        ("static(1M)", "static(1048576)", 1 << 20),
    ],
)
def test_what_works(text: str | None, canonical: str, tokens: int | None) -> None:
    recipe = parse(text)
    assert str(recipe) == canonical
    assert recipe.static_tokens == tokens
    assert parse(canonical) == recipe
    assert parse(recipe) is recipe


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("INT4", "int4"),
        ("int4/int2", "int4/int2"),
        (" fp8 / int8 ", None),
        ("int4( residual = 1k, keys=token )", "int4(keys=token, residual=1024)"),
    ],
)
def test_packed_formats(text: str, canonical: str | None) -> None:
    if canonical is None:
        with pytest.raises(RecipeError):
            parse(text)
        return
    recipe = parse(text)
    assert str(recipe) == canonical
    assert parse(canonical) == recipe
    assert recipe.static_tokens is None
    assert recipe.packed == parse(canonical).packed


def test_what_packed_options_mean() -> None:
    form = parse("int8/int2(residual=128, keys=token, rotate=yes, group=32)").packed
    assert form is not None
    assert form.residual == 128
    assert (form.keys.code, form.values.code) == ("int8", "int2")
    assert (form.keys.axis, form.values.axis) == ("token", "token")
    assert form.keys.rotated
    assert not form.values.rotated
    assert form.keys.scheme(128).group_size == 32
    assert parse("").packed is None
    assert parse("static(4)").packed is None


@pytest.mark.parametrize(
    ("text", "canonical", "bound"),
    [
        ("window(4k)", "window(4096) + dense", (4096, 0, None, 0)),
        ("WINDOW(0.25) + int4", "window(0.25) + int4", (0.25, 0, None, 0)),
        ("window(8, every=1) + sinks(4)", "sinks(4) + window(8, every=1) + dense", (8, 4, 1, 0)),
        ("random(seed=3, keep=.5)", "random(keep=0.5, seed=3) + dense", (0.5, 0, None, 4)),
        ("h2o(keep=64, recent=0)", "h2o(keep=64, recent=0) + dense", (64, 0, None, 4)),
        ("tova(keep=1.0, every=2)", "tova(every=2, keep=1.0) + dense", (1.0, 0, 2, 0)),
        ("int4", "int4", None),
    ],
)
def test_policies(text: str, canonical: str, bound: tuple[object, ...] | None) -> None:
    recipe = parse(text)
    assert str(recipe) == canonical
    assert parse(canonical) == recipe
    assert recipe.bound == bound


def test_what_a_bound_means() -> None:
    bound = parse("sinks(4) + window(64)").bound
    assert bound is not None
    assert (bound.most(1000), bound.least(1000)) == (68, 64)
    bound = parse("h2o(keep=0.25, every=1)").bound
    assert bound is not None
    assert [bound.most(n) for n in (1, 4, 7, 8, 100)] == [1, 1, 1, 2, 25]
    assert bound.least(100) == 25


def test_available_terms_parse() -> None:
    packed = ("int8", "int4", "int2", "fp8")
    policies = (
        "window(4096)", "sinks(4) + window(4096)", "random(keep=0.25)", "h2o(keep=1024)",
        "tova(keep=1024)", "dmc", "dms",
    )  # fmt: skip
    tiers = ("host", "disk(memory=256MiB)")
    assert available() == ("dense", "static(4096)", *packed, *policies, *tiers)
    for term in available():
        parse(term)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("key_norm(keep=0.25)", "not there yet"),
        ("snapkv(keep=0.25) + int4 + host", "not there yet"),
        ("static(4096) + int4", "2 formats"),
        ("int4 + int8", "2 formats"),
        ("static/int4", "keys and values alike"),
        ("dense/int4", "two packed ones"),
        ("int4/dense", "two packed ones"),
        ("int4(128)", "int4 takes residual="),
        ("int4(residuals=128)", "int4 takes residual="),
        ("int4(residual=no)", "residual of int4 is 0 to"),
        ("int4(residual=2.5)", "residual of int4 is 0 to"),
        ("int4/int2(keys=row)", "keys of int4/int2 is token or channel"),
        ("int2(rotate=1)", "rotate of int2 is yes or no"),
        ("int2(group=8)", "group of int2 is 16 to"),
        ("quantized", "Unknown term 'quantized'"),
        ("static", "one positive number"),
        ("static(0)", "one positive number"),
        ("static(-1)", "number"),
        ("static(1.5)", "one positive number"),
        ("static(n=4)", "one positive number"),
        ("static(4, 5)", "one positive number"),
        ("static(4", "Cannot read"),
        ("static(four tokens)", "Cannot read"),
        ("dense(1)", "no arguments"),
        ("dense + static(4)", "2 formats"),
        ("host + disk", "2 tiers"),
        ("window(4) + window(5)", "policy twice"),
        ("static(4)/dense", "Cannot read"),
        ("dense/host", "not a format"),
        ("static/dense", "keys and values alike"),
        ("dense +", "Cannot read"),
        ("+", "Cannot read"),
        ("__import__('os').system('true')", "Cannot read"),
        ("x" * (MAX_LENGTH + 1), "at most"),
        ("static(9999999999999)", "one positive number"),
        ("window", "window takes a whole number of tokens or a decimal fraction"),
        ("window(0)", "window takes"),
        ("window(keep=4)", "window takes"),
        ("window(0.0001)", "0.001..1"),
        ("window(1.5)", "window takes"),
        ("window(4, every=5)", "at most the 4 tokens"),
        ("window(4, every=0)", "between drops"),
        ("sinks(4)", "give it a window"),
        ("sinks(0.5) + window(4)", "sinks takes a whole number"),
        ("sinks(4) + h2o(keep=4)", "one policy decides"),
        ("h2o(keep=4) + tova(keep=4)", "Valid are window(4096)"),
        ("random(keep=4) + window(4)", "one policy decides"),
        ("h2o(1024)", "h2o(keep=1024, recent=0.5)"),
        ("h2o", "h2o takes"),
        ("h2o(keep=4, recent=1.5)", "share of the newest"),
        ("h2o(keep=4, recent=yes)", "share of the newest"),
        ("h2o(keep=4, seed=1)", "h2o takes"),
        ("tova(keep=4, recent=0.5)", "tova takes"),
        ("random(keep=4, seed=half)", "seed of random"),
        ("static(64) + window(8)", "Use a format that grows"),
        ("h2o(keep=4) + host", "would be read from the tier"),
        ("tova(keep=0.5) + disk", "would be read from the tier"),
        ("snapkv(1, keep=2, keep=3)", "twice"),
        ("snapkv(keep=2, 1)", "before key=value"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says.replace("(", r"\(").replace(")", r"\)")):
        parse(text)


@pytest.mark.parametrize("junk", [3, 4.5, b"dense", ["dense"], object()])
def test_only_text(junk: object) -> None:
    with pytest.raises(RecipeError, match="string"):
        parse(junk)  # type: ignore[arg-type]


_PIECES = "dense static int4 window sinks h2o keep= 0.25 host".split()
_PIECES += "( ) + / , = 4k 4096 1.5 - é __import__ lambda { ٣".split()
_WORDS = st.sampled_from([*_PIECES, " ", "\n", "\x00"])


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(max_size=60), st.lists(_WORDS, max_size=9).map("".join)))
def test_anything_parses_or_raises_recipe_error(text: str) -> None:
    try:
        recipe = parse(text)
    except RecipeError as error:
        assert len(str(error)) > 20  # noqa: PT017
    else:
        assert isinstance(recipe, Recipe)
        assert parse(str(recipe)) == recipe
        assert str(parse(str(recipe))) == str(recipe)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2**40), st.sampled_from(["static({})", " static( {} )", "STATIC({})"]))
def test_numbers_round_trip(tokens: int, form: str) -> None:
    recipe = parse(form.format(tokens))
    assert recipe.static_tokens == tokens
    assert str(recipe) == f"static({tokens})"


def test_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("evaluated")

    for name in ("eval", "exec", "compile", "__import__"):
        monkeypatch.setattr(builtins, name, never)
    results = []
    for text in ("static(4)", "static(__import__('os'))", "exec(1)", "dense(open)"):
        try:
            results.append(str(parse(text)))
        except RecipeError:
            results.append("refused")
    monkeypatch.undo()
    assert results == ["static(4)", "refused", "refused", "refused"]
