"""`mnemon chat`: several turns with one cache that is kept, reused and saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.errors import FileError, MnemonError

if TYPE_CHECKING:
    from mnemon.binding import Attachment
    from mnemon.cli.answer import Answer, Sampling
    from mnemon.cli.conversation import Conversation
    from mnemon.cli.models import LoadedModel

HELP = """\
/help          this list
/stats         what the cache holds and what was reused
/save [FILE]   save cache and transcript now
/reset         forget the conversation (the system message stays)
/exit          save the session, if there is one, and leave (also Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Hub name or folder; nothing for the bundled model."
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="Recipe, e.g. 'static(4096)'; default dense.")
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option("--session", help="Resume from this file, and save to it on leaving."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")
    ] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0)] = 0.95,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the random choices.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as one line of JSON.")
    ] = False,
) -> None:
    """Talk to a model; its cache is kept between the turns, so only what is new is computed.

    Questions are lines of standard input, also from a pipe; /help lists commands.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage.
    """
    from mnemon import recipe

    recipe.parse(cache)
    session = session and session.expanduser()
    if session is not None and not session.absolute().parent.is_dir():
        raise FileError(
            f"cannot write {session}: its folder is not there; make it, or name another file."
        )
    import mnemon
    from mnemon.cli.answer import Sampling
    from mnemon.cli.models import load_model

    loaded = load_model(model, dtype=dtype, device=device)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with mnemon.attach(loaded.model) as attachment:
        chat = Chat(
            loaded,
            attachment,
            sampling,
            recipe=cache,
            session=session,
            as_json=as_json,
        )
        chat.open(system)
        if seed is not None:
            import torch

            torch.manual_seed(seed)
        try:
            chat.run()
        finally:
            chat.close()


class Chat:
    """A running conversation: the model, its cache, the transcript."""

    def __init__(
        self,
        loaded: LoadedModel,
        attachment: Attachment,
        sampling: Sampling,
        *,
        recipe: str | None,
        session: Path | None,
        as_json: bool,
    ) -> None:
        from mnemon.cli.conversation import Conversation, turn_marker
        from mnemon.cli.sources import InputError

        if loaded.model.config.is_encoder_decoder:
            raise InputError(
                f"{loaded.name} is an encoder-decoder model, which answers one text at a time; "
                "use `mnemon generate`."
            )
        self.loaded, self.attachment, self.sampling = loaded, attachment, sampling
        self.recipe, self.session, self.as_json = recipe, session, as_json
        self.marker = turn_marker(loaded.tokenizer)
        self.conversation: Conversation = Conversation()
        self.cache: Any = None
        self.last: Answer | None = None
        self.is_changed = False

    def open(self, system: str | None) -> None:
        """Resume the session file, or begin."""
        if self.session is not None and self.session.exists():
            self.resume(self.session)
        else:
            self.cache = self.new_cache()
        if system is not None:
            messages = self.conversation.messages
            others = [message for message in messages if message["role"] != "system"]
            self.conversation.messages = [{"role": "system", "content": system}, *others]
        self.introduce()

    def resume(self, session: Path) -> None:
        """Read the transcript, and the cache if it can be used."""
        import mnemon
        from mnemon import recipe
        from mnemon.cli.conversation import cache_path, load_conversation

        self.conversation, its_recipe = load_conversation(session)
        if self.recipe is None:
            self.recipe = its_recipe
        self.cache = self.new_cache()
        found = f"resumed {session}: {self.conversation.num_turns} turns"
        if str(recipe.parse(self.recipe)) != its_recipe:
            self.say(f"{found}; another recipe, so the first answer computes them again")
            return
        try:
            self.cache = mnemon.load_cache(cache_path(session), self.loaded.model)
        except FileError as error:
            self.say(f"{found}; the first answer computes them again, for {error}")
            return
        self.say(f"{found}, {self.cache.num_tokens:,} tokens cached, recipe {self.cache.recipe}")

    def introduce(self) -> None:
        """Say what to expect of this model, in a line."""
        from mnemon.cli.models import BUNDLED_NAME

        if self.loaded.name == BUNDLED_NAME:
            self.say(
                f"{BUNDLED_NAME} is a small base model: it continues text, it is no assistant."
            )
        elif self.loaded.tokenizer.chat_template is None:
            self.say(
                f"{self.loaded.name} has no chat template, so it is probably a base model: "
                "turns are written as User: / Assistant:"
            )
        if sys.stdin.isatty() and not self.as_json:
            self.say("/help lists the commands")

    def new_cache(self) -> Any:
        """An empty cache of the recipe asked for."""
        import mnemon

        return mnemon.Cache(self.loaded.model.config, self.recipe or "")

    def say(self, text: str) -> None:
        """A line about the chat, apart from the answers."""
        print(output.paint(text, "dim", sys.stderr), file=sys.stderr, flush=True)

    def run(self) -> None:
        """Answer lines until they end."""
        for line in self.lines():
            text = line.strip()
            if not text:
                continue
            if not text.startswith("/"):
                self.answer(text)
            elif not self.obey(text):
                return

    def lines(self) -> Iterator[str]:
        """What the user writes: typed with editing, or piped in. Ctrl-D and Ctrl-C end it."""
        from mnemon.cli.sources import InputError

        if not sys.stdin.isatty():
            try:
                yield from sys.stdin
            except UnicodeDecodeError as error:
                raise InputError(
                    f"standard input is not UTF-8 text ({error}); convert it, e.g. with iconv."
                ) from error
            return
        try:
            import readline  # noqa: F401  (line editing and history for input())
        except ImportError:
            pass
        while True:
            try:
                yield input("\n> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return

    def obey(self, text: str) -> bool:
        """Carry out a slash command; False to leave."""
        name, _, argument = text.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            self.say(HELP)
        elif name == "/stats":
            self.say(self.stats())
        elif name == "/save":
            self.save(Path(argument.strip()).expanduser() if argument.strip() else self.session)
        elif name == "/reset":
            self.conversation.reset()
            self.cache = self.new_cache()
            self.last, self.is_changed = None, True
            self.say("the conversation is forgotten")
        else:
            self.say(f"unknown command {name}\n{HELP}")
        return True

    def answer(self, text: str) -> None:
        """One turn. When it cannot be done, the question is taken back and the reason said."""
        import dataclasses

        from mnemon.cli.answer import answer, interruptible
        from mnemon.cli.sources import InputError, fit_length

        self.conversation.add("user", text)
        config = self.loaded.model.config
        try:
            ids = self.conversation.prompt_ids(self.loaded.tokenizer)
            try:
                room, note = fit_length(config, len(ids), self.sampling.max_new_tokens)
            except InputError as error:
                raise InputError(
                    f"the conversation is full: {error} /reset begins a new one."
                ) from error
            with interruptible() as sign:
                result = answer(
                    self.loaded,
                    ids,
                    self.cache,
                    self.attachment,
                    dataclasses.replace(self.sampling, max_new_tokens=room, seed=None),
                    write=None if self.as_json else lambda piece: print(piece, end="", flush=True),
                    marker=self.marker,
                    sign=sign,
                )
        except (MnemonError, KeyboardInterrupt) as error:
            self.conversation.messages.pop()
            output.print_error(error, as_json=False)
            return
        self.conversation.add("assistant", result.text.strip())
        self.last, self.is_changed = result, True
        self.show(result, note)

    def show(self, result: Answer, note: str) -> None:
        """What follows an answer: a line of figures, or the JSON line."""
        if self.as_json:
            print(json.dumps(self.to_dict(result)), flush=True)
            return
        print(flush=True)
        parts = ["stopped"] if result.interrupted else []
        parts.append(f"reused {result.num_reused:,} of {result.num_prompt:,} tokens")
        if result.first_token_s is not None:
            parts.append(f"first token after {1000 * result.first_token_s:,.0f} ms")
        if result.tokens_per_s is not None:
            parts.append(f"{result.tokens_per_s:.1f} tokens/s")
        self.say(" · ".join([*parts, *([note] if note else [])]))

    def to_dict(self, result: Answer) -> dict[str, Any]:
        """One answer as plain data."""
        return {
            "role": "assistant",
            "content": result.text.strip(),
            "num_prompt": result.num_prompt,
            "num_reused": result.num_reused,
            "num_new": len(result.tokens),
            "first_token_s": result.first_token_s,
            "tokens_per_s": result.tokens_per_s,
            "interrupted": result.interrupted,
            "cache": {"num_tokens": self.cache.num_tokens, "nbytes": self.cache.nbytes},
        }

    def stats(self) -> str:
        """What the cache holds, and what reuse saved so far."""
        cache, stats = self.cache, self.attachment.stats
        return (
            f"{self.conversation.num_turns} turns · cache {cache.recipe}: {cache.num_tokens:,} "
            f"tokens, {output.format_bytes(cache.nbytes)} stored, "
            f"{output.format_bytes(cache.nbytes_reserved)} reserved\n"
            f"prompt tokens: {stats.tokens_reused:,} reused, {stats.tokens_computed:,} computed"
        )

    def save(self, path: Path | None) -> None:
        """Save now; a failure is said, and the chat goes on."""
        from mnemon.cli.conversation import save_session

        if path is None:
            self.say("name a file: /save FILE (or start with --session FILE)")
            return
        try:
            save_session(path, self.conversation, self.cache, self.loaded.model)
        except (MnemonError, OSError) as error:
            output.print_error(error, as_json=False)
            return
        if path == self.session:
            self.is_changed = False
        self.say(f"saved {path} and {self.saved_cache(path)}")

    def saved_cache(self, session: Path) -> str:
        """The cache file beside a session, with its size."""
        from mnemon.cli.conversation import cache_path

        path = cache_path(session)
        return f"{path.name} ({output.format_bytes(path.stat().st_size)})"

    def close(self) -> None:
        """On the way out: save the session if anything changed.

        Raises:
            FileError: it cannot be written; the exit code says so too.
        """
        from mnemon.cli.conversation import save_session

        if self.session is None or not self.is_changed:
            return
        save_session(self.session, self.conversation, self.cache, self.loaded.model)
        self.say(f"saved {self.session} and {self.saved_cache(self.session)}")
