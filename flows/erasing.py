"""A person, erased by name: whoever an import, a program on this machine or an API key's program calls so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feedback.store import Store


def erase_user(root: Path, store: Store, user: str, actor: str) -> Iterator[str]:
    """Erase `user` under every name that this installation gives them; sentences about what came of it.

    Raises ValueError when no name is given, or the installation's secret is none.
    """
    from feedback import keys
    from feedback.identity import Identity, read_secret
    from flows import servers
    from flows.erasure import catch_up
    from flows.record import Records

    if not user:
        raise ValueError("--user: say whose data to erase")
    identity = Identity(read_secret(servers.state_folder(root)))
    with store.read() as connection:
        programs = sorted({key.name for key in keys.listed(connection)})
    names: dict[str, tuple[str, ...]] = {"imports": ("import", user), "this machine": ("user", user)}
    names |= {f"key {name}": ("key", name, user) for name in programs}
    batches: set[int] = set()
    for where, (kind, *parts) in names.items():
        done = store.erase(identity.subject(kind, *parts), actor)
        if done:
            batches.update(done.batches)
            yield f"{where}: {done.completions} answers and {done.opinions} opinions erased"
        else:
            yield f"{where}: there was nothing"
    if store.unflagged_erasures():
        seen = catch_up(root, store, Records(root))
        state = "were deleted, and the models flagged" if seen else "wait for the flow reconcile: stages run here"
        yield (
            f"batches {sorted(batches)} had accepted some of it; snapshots of before {state}"
            if batches
            else (f"no batch had accepted any of it; snapshots of before {state}")
        )
