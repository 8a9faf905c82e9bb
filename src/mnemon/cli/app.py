"""The `mnemon` command: one table of commands, each in its own file, imported when it runs.

Exit codes: 0 done; 1 an error with a message; 2 wrong usage; 3 it ran and the answer is no (a plan
that does not fit, tokens that differ); 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from mnemon.cli import output

if TYPE_CHECKING:
    import typer

# Command -> (module with a function `command`, the line that `mnemon --help` shows).
COMMANDS = {
    "demo": ("mnemon.cli.demo", "A real model, a real text, every cache: a table and report.html."),
    "generate": ("mnemon.cli.generate", "Generate text with any cache; save and load it."),
    "chat": ("mnemon.cli.chat", "Talk to a model over several turns; its cache is kept and saved."),
    "plan": ("mnemon.cli.plan", "Which recipes fit in memory, before anything is loaded."),
    "inspect": ("mnemon.cli.inspect", "What a saved cache holds."),
    "export": ("mnemon.cli.export", "A model with free lengths to ONNX, torch or AOTInductor."),
    "migrate": ("mnemon.cli.migrate", "Old names of the cache API in your code, to modern ones."),
    "retrofit": ("mnemon.cli.retrofit", "Train a model to compress its own cache: DMC or DMS."),
    "bench": ("mnemon.cli.bench", "Speed and memory against transformers' own caches."),
}
# Group -> (the line that `mnemon --help` shows, commands as above).
GROUPS = {
    "diffusion": (
        "Caching between denoising steps: a demo, speed, quality, fitting.",
        {
            "demo": (
                "mnemon.cli.diffusion.demo",
                "Every method from the same noise: a table, pictures and diffusion.html.",
            ),
            "bench": (
                "mnemon.cli.diffusion.bench",
                "Seconds, multiply-accumulates and bytes held, by method.",
            ),
            "eval": (
                "mnemon.cli.diffusion.evaluate",
                "Quality at equal cost: each family against fewer steps, and each other.",
            ),
            "fit": (
                "mnemon.cli.diffusion.fit",
                "A plan for the method `fitted`: which steps to compute, weights for the rest.",
            ),
            "train-router": (
                "mnemon.cli.diffusion.train_router",
                "A router for the method `l2c`: which sublayers a step may reuse.",
            ),
        },
    ),
    "memory": (
        "Learned memories: what a gated recurrent cache brings, with controls.",
        {
            "listops": (
                "mnemon.cli.memory.listops",
                "Accuracy on nested lists of digits.",
            ),
            "digits": (
                "mnemon.cli.memory.digits",
                "Accuracy of a small ViT on scikit-learn's digits.",
            ),
            "lm": (
                "mnemon.cli.memory.lm",
                "Bits per byte on Python's sources, read in segments.",
            ),
        },
    ),
}
EPILOGUE = (
    "Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 3 it ran and the answer is no "
    "(does not fit, tokens differ); 130 interrupted. Every command takes --json. MODEL is a Hub "
    "name, a folder, or nothing for the bundled model."
)

GROUP_EPILOGUES = {
    "diffusion": (
        "Exit codes as in `mnemon --help`. PIPE is the folder of a saved DiTPipeline, or nothing "
        "for the bundled one. Needs mnemon's extra `diffusion`."
    ),
    "memory": "Exit codes as in `mnemon --help`. Needs scikit-learn (mnemon's extra `diffusion`).",
}


def build(*needed: str) -> typer.Typer:
    """Build the typer application.

    Args:
        needed: commands to import in full, those of a group as "diffusion demo"; the others are
            only listed with their help line.
    """
    import typer

    app = typer.Typer(
        name="mnemon",
        help="Caches that transformers keep between two forward passes: run, measure, plan.",
        epilog=EPILOGUE,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def main_options(
        version: bool = typer.Option(False, "--version", help="Show the version and exit."),
    ) -> None:
        if version:
            from importlib.metadata import PackageNotFoundError
            from importlib.metadata import version as installed

            try:
                print(f"mnemon {installed('mnemon')}")
            except PackageNotFoundError:
                print("mnemon (not installed: running from source)")
            raise typer.Exit()

    app.callback(invoke_without_command=True)(main_options)
    _add(app, COMMANDS, needed, prefix="")
    for group, (summary, commands) in GROUPS.items():
        inner = typer.Typer(help=summary, epilog=GROUP_EPILOGUES[group], no_args_is_help=True)
        _add(inner, commands, needed, prefix=f"{group} ")
        app.add_typer(inner, name=group)
    return app


def _add(
    app: typer.Typer, commands: dict[str, tuple[str, str]], needed: tuple[str, ...], *, prefix: str
) -> None:
    for name, (module, summary) in commands.items():
        if prefix + name in needed:
            app.command(name)(output.guarded(import_module(module).command))
        else:
            app.command(name, help=summary)(_not_imported)


def _not_imported() -> NoReturn:
    raise AssertionError("a command ran without being imported")


def _needed(arguments: list[str]) -> tuple[str, ...]:
    """The commands this call runs: all of them when a shell asks for completions."""
    if "_MNEMON_COMPLETE" in os.environ:
        return (*COMMANDS, *(f"{g} {name}" for g, (_, found) in GROUPS.items() for name in found))
    return " ".join(arguments[:1]), " ".join(arguments[:2])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: the words after `mnemon`; None takes them from the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a "?" in an ASCII locale, not a traceback
    try:
        _run(arguments)
    except KeyboardInterrupt:  # while a command was being imported
        print("interrupted", file=sys.stderr)
        sys.exit(output.EXIT_INTERRUPTED)
    except OSError as error:  # a help text that cannot be written
        output.print_error(error, as_json=False)
        sys.exit(output.EXIT_ERROR)


def _run(arguments: list[str]) -> NoReturn:
    if arguments[:1] == ["plan"] and "_MNEMON_COMPLETE" not in os.environ:
        from mnemon.cli import plan_table

        # Importing typer alone takes 90 ms of the 150 that plan may; a well-formed plan needs none.
        options = plan_table.quick_parse(arguments[1:])
        if options is not None:
            sys.exit(output.guarded(plan_table.run)(**options._asdict()))
    build(*_needed(arguments))(args=arguments, prog_name="mnemon")
    raise AssertionError("typer exits by itself")


if __name__ == "__main__":
    main()
