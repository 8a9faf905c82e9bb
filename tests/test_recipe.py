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


def test_available_terms_parse() -> None:
    packed = ("int8", "int4", "int2", "fp8")
    assert available() == ("dense", "static(4096)", *packed, "host", "disk(memory=256MiB)")
    for term in available():
        parse(term)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sinks(4) + window(4096)", "not there yet"),
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


_PIECES = "dense static int4 window host ( ) + / , = 4k 4096 1.5 - é __import__ lambda { ٣".split()
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
