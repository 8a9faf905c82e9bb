"""`mnemon plan`: which recipes fit in memory, before anything is loaded.

The work is in `plan_table`; this file is only its typer face, because importing typer takes most
of the 150 ms in which a plan must start.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mnemon.cli import plan_table


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub name, folder or config.json; nothing for the bundled model."),
    ] = None,
    context: Annotated[
        str, typer.Option("--context", "-c", help="Tokens per row: 4096, 32k, 1M.")
    ] = plan_table.DEFAULT_CONTEXT,
    batch: Annotated[
        int, typer.Option("--batch", "-b", min=1, max=plan_table.MAX_BATCH, help="Rows.")
    ] = 1,
    memory: Annotated[
        str | None,
        typer.Option("--memory", "-m", help="What weights and cache must fit in: 24GiB, 80GB."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (as saved), float32, bfloat16 or float16.")
    ] = "auto",
    source: Annotated[
        str | None,
        typer.Option("--source", help="Encoder tokens per row, for encoder-decoder models."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="A recipe to plan besides, e.g. 'h2o(keep=0.25) + int4'."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which recipes fit in memory, before anything is loaded.

    Bytes are exact, from config.json alone; weights are read from the files' headers where they
    are on this machine. Exits with 3 when --memory is given and no recipe fits.
    """
    code = plan_table.run(
        model=model,
        context=context,
        batch=batch,
        memory=memory,
        dtype=dtype,
        source=source,
        cache=cache,
        as_json=as_json,
    )
    raise typer.Exit(code)
