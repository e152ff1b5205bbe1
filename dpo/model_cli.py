"""`dpo export`, `dpo chat` and `dpo card`: models that leave, answer and give an account of themselves."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dpo.data_cli import OVERRIDES, Debug

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or of one of its stages.")]

model_app = typer.Typer()


@model_app.command(
    name="export",
    context_settings=OVERRIDES,
    epilog="Example: dpo export runs/dpo-1a2b3c4d --to my-model --format merged",
)
def export_command(
    context: typer.Context,
    run: Folder,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="The new folder.")],
    kind: Annotated[str, typer.Option("--format", metavar="adapter|merged|ollama", help="What to write.")] = "adapter",
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The base that an adapter names; with ollama a model that Ollama has."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="auto|bfloat16|float16|float32", help="Of a merged model; auto takes 16 bits.")
    ] = "auto",
    dequantise: Annotated[
        bool,
        typer.Option("--dequantise", help="Merge what was trained on 4-bit weights into 16-bit ones all the same."),
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this hub repository (private if new).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run's model for others: a LoRA adapter, a merged model, or a folder for Ollama, with the card.

    model.key=value and data.key=value say where base and data are now, where they have moved.
    """
    from typing import get_args

    from dpo.errors import ConfigError
    from dpo.export import Format, export
    from dpo.merge import Precision
    from dpo.run import speaking
    from dpo.settings import read_overrides

    with speaking(debug):
        for option, got, known in (("--format", kind, get_args(Format)), ("--dtype", dtype, get_args(Precision))):
            if got not in known:
                raise ConfigError(f"{option}: got {got!r}, expected one of {', '.join(known)}.")
        done = export(
            run,
            to,
            kind,  # pyright: ignore[reportArgumentType]  (looked at above)
            base=base,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            dequantise=dequantise,
            push=push,
            overrides=read_overrides(context.args),
        )
        print(f"{done.format}: {done.folder}" + ("" if done.pushed is None else f", uploaded to {done.pushed}"))


@model_app.command(
    name="chat", context_settings=OVERRIDES, epilog="Example: dpo chat runs/dpo-1a2b3c4d --temperature 0.7"
)
def chat_command(
    context: typer.Context,
    run: Folder,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    debug: Debug = False,
) -> None:
    """Talk to a run beside its start: both answer, side by side, each with a history of its own.

    /reset begins anew, /system TEXT sets a system message, /quit ends. Lines can come from a pipe.
    """
    from dpo.chat import Manner, chat, talk_to
    from dpo.run import speaking
    from dpo.settings import read_overrides

    with speaking(debug):
        manner = Manner(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        overrides = read_overrides(context.args)
        chat(talk_to(run, manner=manner, system=system, overrides=overrides), sys.stdin, sys.stdout)


@model_app.command(name="card", epilog="Example: dpo card runs/dpo-1a2b3c4d")
def card_command(
    run: Folder,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that was edited.")] = False,
    debug: Debug = False,
) -> None:
    """Write a run's model card again: what was done, what came out, and what nobody looked at."""
    from dpo.card import write_card
    from dpo.run import read_last_stage, speaking

    with speaking(debug):
        print(write_card(read_last_stage(run).folder, force))
