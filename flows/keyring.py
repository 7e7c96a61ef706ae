"""`thumbwheel key`: API keys of the feedback service."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands import actor, fail, opinions

app = typer.Typer(help="API keys of the feedback service.", no_args_is_help=True)


@app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="whose it is; keys of one name speak for the same people")],
    scope: Annotated[list[str], typer.Option(help="chat, rate, label, moderate, read or admin; as often as needed")],
    days: Annotated[float | None, typer.Option(help="it ends after so many days; never, if not given")] = None,
) -> None:
    """Make a key and show it, once: only its hash is kept."""
    from feedback import keys

    with opinions() as store:
        try:
            with store.write() as connection:
                key, secret = keys.create(connection, name, scope, actor(), days)
        except ValueError as error:
            raise fail(error) from error
    typer.echo(
        f"key {key.id} ({', '.join(s for s in keys.SCOPES if s in key.scopes)}); it is shown this once:", err=True
    )
    typer.echo(secret)


@app.command("list")
def list_keys() -> None:
    """Show the keys, without their secrets."""
    from datetime import UTC, datetime

    from feedback import keys

    with opinions() as store, store.read() as connection:
        found = keys.listed(connection)
    for key in found:
        state = key.problem(datetime.now(UTC)) or ("until " + f"{key.expires_at:%F}" if key.expires_at else "works")
        used = f"{key.last_used_at:%F %H:%M} UTC" if key.last_used_at else "never"
        scopes = ",".join(scope for scope in keys.SCOPES if scope in key.scopes)
        typer.echo(f"{key.id:>4}  {key.name:24} {scopes:36} {state:16} made {key.created_at:%F}, used {used}")
    if not found:
        typer.echo("there is no key; make one with `thumbwheel key create --scope chat NAME`", err=True)


@app.command("revoke")
def revoke_key(number: Annotated[int, typer.Argument(help="as `thumbwheel key list` shows it")]) -> None:
    """End a key; the service follows within seconds."""
    from feedback import keys

    with opinions() as store:
        try:
            with store.write() as connection:
                key = keys.revoke(connection, number, actor())
        except KeyError as error:
            raise fail(error.args[0]) from error
    typer.echo(f"key {key.id} ({key.name}) is revoked")
