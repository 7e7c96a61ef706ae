"""`thumbwheel status`: the whole wheel on one screen. What cannot be asked is said, and stops nothing else."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import approval, servers, settings

if TYPE_CHECKING:
    from feedback.store import Store


def gather(root: Path) -> dict[str, Any]:
    """Everything, as plain values: servers, champion, opinions, batches, gate, approvals, retrain, quarantine, problems."""
    found: dict[str, Any] = {"servers": running(root), "problems": []}
    found |= {"champion": None, "opinions_waiting": None, "open_batches": None, "quarantined": None}
    for part in (opinions, gate, retrain):
        try:
            found |= part(root)
        except Exception as error:  # a status must show what else there is
            found["problems"].append(
                f"{part.__name__}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
    found["approvals_waiting"] = [question.candidate for question in approval.waiting(root)]
    return found


def running(root: Path) -> dict[str, dict[str, Any]]:
    """Each server: its state ("running", "not running", "does not answer", "died"), address, pid and log."""
    known = servers.read(root)
    found: dict[str, dict[str, Any]] = {}
    for name in servers.ALL:
        server = known.get(name)
        if server is None:
            found[name] = {"state": "not running"}
            continue
        state = "running" if servers.healthy(root, server) else "does not answer" if server.alive else "died"
        log = str(servers.log_path(root, name))
        found[name] = {"state": state, "url": server.url, "pid": server.pid, "log": log}
    return found


def opinions(root: Path) -> dict[str, Any]:
    """What the feedback database knows; nothing of it is made here."""
    from sqlalchemy.engine import make_url

    from feedback.store import Store

    url = servers.database_url(root)
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        return {}
    store = Store(url)
    try:
        return _opinions(store, settings.load(root))
    finally:
        store.close()


def _opinions(store: Store, params: settings.Params) -> dict[str, Any]:
    import sqlalchemy as sa

    from feedback.tables import FeedbackRow, table_of
    from flows import probation

    feedback, pending = table_of(FeedbackRow), store.pending(params.trust)
    with store.read() as connection:
        count = sa.select(sa.func.count()).where(feedback.c.moderation == "quarantined")
        quarantined = connection.execute(count).scalar_one()
    batches = store.open_batches()
    reigning, stands = store.champion(), probation.examine(store, params.probation)
    champion: dict[str, Any] | None = None
    if reigning is not None and stands is not None:
        named: dict[str, Any] = {
            key: reigning.figures[key] for key in ("mlflow_run_id", "approval") if key in reigning.figures
        }
        champion = {**stands.as_dict(), "action": reigning.action, "reason": reigning.reason, **named}
    return {
        "champion": champion,
        "opinions_waiting": {
            "count": pending.count,
            "needed": params.bell.opinions,
            "oldest_at": _iso(pending.oldest_at),
        },
        "open_batches": [{"id": b.id, "accepted": b.accepted, "opened_at": _iso(b.opened_at)} for b in batches],
        "quarantined": quarantined,
    }


def gate(root: Path) -> dict[str, Any]:
    """The last decision of the gate, from the judge's report."""
    path = root / "artifacts/judge/report.json"
    if not path.exists():
        return {"gate": None}
    report = json.loads(path.read_text(encoding="utf-8"))
    told = {key: report["gate"][key] for key in ("decision", "reasons")}
    moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return {
        "gate": {"candidate": report["candidate"]["model_hash"], **told, "at": moment.isoformat(timespec="seconds")}
    }


def retrain(root: Path) -> dict[str, Any]:
    """The newest flow run of `retrain`, asked of Prefect's API without loading Prefect."""
    server = servers.read(root).get("prefect")
    if server is None or not server.alive:
        return {"retrain": None}
    import httpx

    body = {"flows": {"name": {"any_": ["retrain"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    answer = httpx.post(f"{server.url}/api/flow_runs/filter", json=body, trust_env=False, timeout=10)
    answer.raise_for_status()
    runs = answer.json()
    if not runs:
        return {"retrain": None}
    run = runs[0]
    times = {key: run.get(key) for key in ("start_time", "end_time")}
    message = (run.get("state") or {}).get("message") or ""
    return {"retrain": {"id": run["id"], "name": run["name"], "state": run["state_name"], "message": message, **times}}


def lines(found: dict[str, Any]) -> list[str]:
    """The screen."""
    out = []
    for name, server in found["servers"].items():
        state = server["state"]
        if state == "running":
            out.append(f"{name:8} {server['url'] or 'running'} (pid {server['pid']})")
        else:
            out.append(f"{name:8} {state}" + (f"; its log: {server['log']}" if "log" in server else ""))
    out += ["", *_champion(found["champion"])]
    waiting = found["opinions_waiting"]
    if waiting is not None:
        since = f", the oldest since {_short(waiting['oldest_at'])}" if waiting["oldest_at"] else ""
        out.append(f"opinions   {waiting['count']} of {waiting['needed']} for the next batch{since}")
        batches = ", ".join(f"{b['id']} ({b['accepted']} opinions)" for b in found["open_batches"])
        out.append(f"batches    open: {batches or 'none'}")
        out.append(f"quarantine {found['quarantined']} opinions")
    told = found.get("gate")
    if told:
        out.append(f"gate       {told['decision']} {told['candidate'][:12]} ({_short(told['at'])})")
        out += [f"           - {reason}" for reason in told["reasons"]]
    out += [
        f"approval   {candidate[:12]} waits for a person (Prefect, flow approve)"
        for candidate in found["approvals_waiting"]
    ]
    run = found.get("retrain")
    if run:
        when = _short(run["end_time"] or run["start_time"])
        out.append(f"retrain    {run['name']}: {run['state']}{' ' + when if when else ''}{_after(run['message'])}")
    return out + [f"✘ {problem}" for problem in found["problems"]]


def _champion(champion: dict[str, Any] | None) -> list[str]:
    if champion is None:
        return ["champion   nobody yet"]
    why = f"{champion['action']}{_after(champion['reason'])}"
    out = [f"champion   {champion['champion'][:12]} since {_short(champion['since'])} ({why})"]

    def rate(thumbs: int, share: float | None) -> str:
        return f"{share:.1%} of {thumbs} thumbs up" if share is not None else "no thumbs yet"

    out.append(f"           live: {rate(champion['thumbs'], champion['rate'])}")
    if champion["before"]:
        before = rate(champion["before_thumbs"], champion["before_rate"])
        out[-1] += (
            f"; {champion['before'][:12]} before: {before}; evidence against it {champion['evidence']['value']:.3g}"
        )
    return out


def _after(text: str) -> str:
    return f": {text}" if text else ""


def _short(moment: str | None) -> str:
    return moment[:16].replace("T", " ") + " UTC" if moment else ""


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
