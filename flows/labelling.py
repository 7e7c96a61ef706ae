"""`thumbwheel label`: make tasks for those who rank answers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands import fail, opinions

if TYPE_CHECKING:
    import httpx

    from feedback.prompts import Prompt
    from feedback.remote import RemoteEngine
    from feedback.store import Store

app = typer.Typer(help="Tasks for the labelling page: answers to rank, and gold ones.", no_args_is_help=True)
AT_ONCE = 4  # prompts under way: the service answers people meanwhile


@app.command()
def make(
    prompts: Annotated[
        Path | None, typer.Option(help="jsonl with prompt or messages; else what people asked", exists=True)
    ] = None,
    recent: Annotated[int, typer.Option(help="how many of the newest prompts of people, without a file", min=1)] = 50,
    answers: Annotated[int, typer.Option(help="answers to each prompt", min=2, max=9)] = 4,
    raters: Annotated[int, typer.Option(help="how many people are to rank each", min=1, max=100)] = 1,
    engine: Annotated[
        list[str] | None, typer.Option(help="a server of chat completions, up to /v1, to share the answers with")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="of an answer of --engine", min=1)] = 256,
) -> None:
    """Ask the model that serves (and others by URL) for several answers to each prompt, for people to rank. Doing it again
    with the same prompts and models adds nothing. Exit code 1: for some prompts no task could be made."""
    from rich.progress import Progress

    from feedback import prompts as source
    from feedback.identity import Identity, read_secret
    from flows import servers

    root = servers.workspace()
    server = servers.read(root).get("service")
    if server is None or not server.alive:
        raise fail("the chat service does not run: start it with `thumbwheel up`")
    try:
        with opinions() as store, Progress(transient=True) as progress:
            if prompts is not None:
                subject = Identity(read_secret(servers.state_folder(root))).subject("import", "", "prompts")
                rows: list[source.Asked] = list(source.read_lines(prompts, source.Asked))
                chosen = [source.Prompt(row.plain(), None, subject) for row in rows]
            else:
                with store.read() as connection:
                    chosen = source.recent(connection, recent)
            if not chosen:
                raise fail("people have asked nothing so far: name a file with --prompts")
            bar = progress.add_task("prompts", total=len(chosen))
            wish = {"answers": answers, "raters": raters, "temperature": temperature, "max_tokens": max_tokens}
            job = asked(store, server.url, engine or [], chosen, wish, lambda: progress.advance(bar))
            made, known, problems = asyncio.run(job)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(f"{made} tasks made, {known} were there already")
    if problems:
        for problem in problems[:10]:
            typer.echo(f"  {problem}", err=True)
        raise fail(f"for {len(problems)} of {len(chosen)} prompts no task could be made")


@app.command()
def gold(
    file: Annotated[
        Path, typer.Argument(help="jsonl: messages or prompt, answers, ranking ([[2], [1, 3]])", exists=True)
    ],
) -> None:
    """Make gold tasks, whose right order is known. Making them again adds nothing; a wrong line, and none is made."""
    from rich.progress import Progress

    from feedback.identity import Identity, read_secret
    from feedback.prompts import load_gold
    from flows import servers

    try:
        identity = Identity(read_secret(servers.state_folder(servers.workspace())))
        with opinions() as store, Progress(transient=True) as progress:
            bar = progress.add_task(file.name, total=None)
            made, known = load_gold(store, identity, file, lambda done: progress.update(bar, completed=done))
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(f"{made} gold tasks made, {known} were there already")


async def asked(
    store: Store, url: str, engines: list[str], prompts: list[Prompt], wish: dict[str, Any], done: Any
) -> tuple[int, int, list[str]]:
    """Tasks made and found, and why others could not be."""
    import httpx

    from feedback.engine import EngineError
    from feedback.remote import RemoteEngine
    from feedback.settings import Settings

    settings = Settings()
    others = [RemoteEngine(settings.model_copy(update={"engine_url": other})) for other in engines]
    key = os.environ.get("THUMBWHEEL_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    counts, problems, turn = {201: 0, 200: 0}, list[str](), asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, trust_env=False) as client:

        async def one(prompt: Prompt) -> None:
            async with turn:
                try:
                    counts[await task(client, store, others, prompt, wish)] += 1
                except (EngineError, httpx.HTTPError) as problem:
                    problems.append(f"{prompt.messages[-1]['content'][:60]!r}: {problem}")
                done()

        await asyncio.gather(*(one(prompt) for prompt in prompts))
    for other in others:
        await other.close()
    return counts[201], counts[200], problems


async def task(
    client: httpx.AsyncClient, store: Store, others: list[RemoteEngine], prompt: Prompt, wish: dict[str, Any]
) -> int:
    """Make one task; the service's status: 201 made, 200 found. The model that serves takes its share, and the rest of it."""
    from feedback.engine import EngineError
    from feedback.prompts import ask_engine

    share = wish["answers"] // (len(others) + 1)
    ids: list[str] = []
    for other in others if share else others[: wish["answers"]]:
        ids += await ask_engine(store, other, prompt, max(share, 1), wish["temperature"], wish["max_tokens"])
    what = {"of": prompt.of} if prompt.of else {"messages": prompt.messages}
    body: dict[str, Any] = {"completion_ids": ids, "raters": wish["raters"]}
    if rest := wish["answers"] - len(ids):
        body |= {**what, "answers": rest, "temperature": wish["temperature"]}
    response = await client.post("/v1/tasks", json=body)
    if response.status_code not in (200, 201):
        raise EngineError("refused", response.json()["error"]["message"])
    return response.status_code
