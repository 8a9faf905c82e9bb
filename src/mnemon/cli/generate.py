"""`mnemon generate`: text from any model with any cache; save the cache, load it, reuse it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mnemon.cli import output
from mnemon.errors import FileError

if TYPE_CHECKING:
    from mnemon.cli.answer import Answer
    from mnemon.cli.models import LoadedModel

Text = str | None


def command(
    model: Annotated[
        Text,
        typer.Argument(
            metavar="[MODEL]", help="Hub name or folder; nothing for the bundled model."
        ),
    ] = None,
    prompt: Annotated[Text, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    prompt_file: Annotated[
        Text,
        typer.Option("--prompt-file", help="A text file, - for stdin; --prompt comes after it."),
    ] = None,
    cache: Annotated[
        Text, typer.Option("--cache", help="Recipe, e.g. 'static(4096)'; dense when left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0)] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the random choices.")
    ] = None,
    num_beams: Annotated[
        int, typer.Option("--num-beams", min=1, help="Beam search, which cannot stream.")
    ] = 1,
    save_cache: Annotated[
        Path | None, typer.Option("--save-cache", help="Write the cache here when done.")
    ] = None,
    load_cache: Annotated[
        Path | None,
        typer.Option(
            "--load-cache",
            help="Start from this file; what it shares with the prompt is not computed again. "
            "Without a prompt, its own text is continued.",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Aligned chunks: reuse changes no bit of the result.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Text as it comes.")] = True,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Continue a prompt (an option, a file, or standard input) and say what it took.

    The text goes to standard output, the summary to standard error.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted.
    """
    if cache is not None and load_cache is not None:
        raise typer.BadParameter(
            "the file names its own recipe; leave --cache out.", param_hint="--load-cache"
        )
    if num_beams > 1 and save_cache is not None:
        raise typer.BadParameter(
            "beam search ends with one row per beam, not with the text's cache; use one beam.",
            param_hint="--save-cache",
        )
    text = _prompt_text(prompt, prompt_file, wanted=load_cache is None)
    save_cache = save_cache and save_cache.expanduser()
    if save_cache is not None and not save_cache.absolute().parent.is_dir():
        raise FileError(
            f"cannot write {save_cache}: its folder is not there; make it, or name another file."
        )

    from mnemon import recipe

    recipe.parse(cache)  # a wrong recipe is said before a model is loaded

    from mnemon.cli.answer import Sampling
    from mnemon.cli.models import load_model

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        num_beams=num_beams,
    )
    loaded = load_model(model, dtype=dtype, device=device)
    show = stream and num_beams == 1 and not as_json
    done = _run(loaded, text, sampling, cache, load_cache, exact=exact, stream=show)
    if not as_json:  # before saving: a full disk must not cost the text
        print("" if show else done.answer.text, flush=True)
    if save_cache is not None:
        done.cache.save(save_cache, model=loaded.model)
    if as_json:
        output.print_json(done.to_dict(loaded.name, save_cache))
        return
    for line in done.lines(save_cache):
        print(output.paint(line, "dim", sys.stderr), file=sys.stderr)


class _Done(NamedTuple):
    """A finished generation."""

    answer: Answer
    cache: Any
    num_loaded: int
    notes: list[str]

    def lines(self, saved: Path | None) -> list[str]:
        answer, cache = self.answer, self.cache
        parts = [f"{len(answer.tokens):,} tokens"]
        if answer.tokens_per_s is not None:
            parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
        if answer.first_token_s is not None:
            parts.append(f"first token after {1000 * answer.first_token_s:,.0f} ms")
        parts.append(
            f"cache {cache.recipe}: {cache.num_tokens:,} tokens, "
            f"{output.format_bytes(cache.nbytes)}"
        )
        parts.append(f"reused {answer.num_reused:,} of {answer.num_prompt:,} prompt tokens")
        lines = [*self.notes, " · ".join(parts)]
        if saved is not None:
            lines.append(f"cache saved: {saved} ({output.format_bytes(saved.stat().st_size)})")
        return lines

    def to_dict(self, model: str, saved: Path | None) -> dict[str, Any]:
        answer, cache = self.answer, self.cache
        return {
            "model": model,
            "text": answer.text,
            "tokens": answer.tokens,
            "num_prompt": answer.num_prompt,
            "num_reused": answer.num_reused,
            "num_loaded": self.num_loaded,
            "first_token_s": answer.first_token_s,
            "tokens_per_s": answer.tokens_per_s,
            "total_s": answer.total_s,
            "cache": {
                "recipe": str(cache.recipe),
                "num_tokens": cache.num_tokens,
                "nbytes": cache.nbytes,
                "nbytes_reserved": cache.nbytes_reserved,
                "saved": None if saved is None else str(saved),
            },
            "notes": self.notes,
        }


def _prompt_text(prompt: Text, prompt_file: Text, *, wanted: bool) -> Text:
    """The prompt from the option, the file or standard input; None to continue a loaded cache."""
    from mnemon.cli.sources import InputError, read_text

    if prompt is not None and not prompt.strip() and prompt_file is None:
        raise InputError("--prompt is empty; give it some text.")
    pieces = [] if prompt_file is None else [read_text(prompt_file).text]
    if prompt is not None:
        pieces.append(prompt)
    if pieces:
        return "".join(pieces)
    if not wanted:
        return None
    if sys.stdin.isatty():
        raise typer.BadParameter(
            "nothing to continue; give --prompt, --prompt-file, --load-cache, or pipe a text in."
        )
    return read_text("-").text


def _run(
    loaded: LoadedModel,
    text: Text,
    sampling: Any,
    recipe: Text,
    path: Path | None,
    *,
    exact: bool,
    stream: bool,
) -> _Done:
    import mnemon
    from mnemon.cli.answer import answer
    from mnemon.cli.sources import InputError, encode, fit_length

    cache = (
        mnemon.Cache(loaded.model.config, recipe or "")
        if path is None
        else mnemon.load_cache(path, loaded.model)
    )
    num_loaded, notes = cache.num_tokens, []
    if text is not None:
        ids = encode(loaded.tokenizer, text)
    else:
        if loaded.model.config.is_encoder_decoder:
            raise InputError(
                f"{path} is the cache of an encoder-decoder model, which holds the answer and not "
                "the prompt's text; give the prompt with --prompt or --prompt-file."
            )
        ids = cache.tokens[0].tolist() if num_loaded else []
        if min(ids, default=-1) < 0:
            raise InputError(
                f"{path} does not name all of its tokens, so its text cannot be continued; "
                "give the whole prompt with --prompt or --prompt-file."
            )
    if not ids:
        raise InputError("the prompt has no tokens; give it some text.")
    max_new, note = fit_length(loaded.model.config, len(ids), sampling.max_new_tokens)
    notes += [note] if note else []
    # An encoder-decoder's cache holds its answer: the prompt's tokens are not what to compare.
    if path is not None and not loaded.model.config.is_encoder_decoder:
        shared = cache.common_prefix(_row(ids))
        if shared < num_loaded:
            notes.append(
                f"the loaded cache holds {num_loaded:,} tokens, of which the prompt begins with "
                f"{shared:,}; the rest was left out."
            )

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    import dataclasses

    sampling = dataclasses.replace(sampling, max_new_tokens=max_new)
    with mnemon.attach(loaded.model, exact=exact) as attachment:
        result = answer(loaded, ids, cache, attachment, sampling, write=write if stream else None)
    return _Done(result, cache, num_loaded, notes)


def _row(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])
