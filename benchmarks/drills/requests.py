"""Requests: schemathesis makes requests of the service's OpenAPI schema, valid and invalid ones, for every route; none may end in
a server error or contradict the schema, and none may succeed without a key, or with one that lacks the scope."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.drills import databases
from benchmarks.drills.services import Service, make_model, promote, seed_answers
from feedback import keys
from feedback.access import OPEN, ROUTES
from feedback.store import Store

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
REFUSED = (401, 403)
HEADERS = ("authorization", "cookie", "host", "x-thumbwheel-feedback-token")  # not those that schemathesis makes up
ROUNDS = 4
WITHOUT = ("no key", "key without the scope", "key that does not exist")


@dataclass
class Seen:
    """What came of the requests: statuses, and for each kind of failure an example."""

    requests: int = 0
    cases: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    unauthorised: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def make_keys(database_url: str) -> dict[str, str]:
    """Secrets of a key with all scopes ("all"), and of one without each scope."""
    store, made = Store(database_url), dict[str, str]()
    store.migrate()
    with store.write() as connection:
        made["all"] = keys.create(connection, "all", list(keys.SCOPES), "a drill")[1]
        for scope in keys.SCOPES:
            others = [other for other in keys.SCOPES if other != scope]
            made[scope] = keys.create(connection, f"all but {scope}", others, "a drill")[1]
    store.close()
    return made


def ground(case: schemathesis.Case, ids: list[list[str]], luck: random.Random) -> None:
    """Let half of the requests speak of answers that are there."""
    if luck.random() < 0.5:
        return
    group = luck.choice(ids)
    if "completion_id" in (case.path_parameters or {}):
        case.path_parameters["completion_id"] = group[0]
    if isinstance(case.query, dict) and "completion_id" in case.query:
        case.query["completion_id"] = group[:2]
    if isinstance(case.body, dict):
        if "completion_id" in case.body:
            case.body["completion_id"] = group[0]
        if "completion_ids" in case.body:
            case.body["completion_ids"] = group[:2]


def ask(case: schemathesis.Case, send: Callable[..., Any], secrets: dict[str, str], scope: str, seen: Seen) -> None:
    """Send a case with a key of all scopes and check the answer, then without what the route asks for."""
    where = f"{case.method} {case.path}"
    refusals = WITHOUT if scope != OPEN and seen.cases % 4 == 0 else ()
    seen.cases += 1
    for how in ("all", *refusals):
        secret = {"all": secrets["all"], "no key": "", "key without the scope": secrets.get(scope, "")}.get(
            how, "tw_none"
        )
        case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() not in HEADERS}
        response = send(case, headers={"Authorization": f"Bearer {secret}"} if secret else {})
        seen.requests += 1
        seen.statuses[str(response.status_code)] += 1
        if how != "all":
            if response.status_code not in REFUSED:
                seen.unauthorised.append(f"{where} with {how}: {response.status_code}")
            continue
        try:
            case.validate_response(response, checks=CHECKS)
        except (Exception, FailureGroup) as problem:
            first = getattr(problem, "exceptions", [problem])[0]
            name = f"{where} {response.status_code} {type(first).__name__}"
            seen.failures.setdefault(
                name, f"{str(first)[:400]} | {response.text[:200]} | {case.as_curl_command()[:600]}"
            )


def drill(port: int, number: int, secrets: dict[str, str], ids: list[list[str]], seed: int) -> Seen:
    """About `number` requests, evenly over the operations, valid and invalid in turns."""
    url = f"http://127.0.0.1:{port}"
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    seen, luck, session = Seen(), random.Random(seed), requests.Session()
    send = partial(schemathesis.Case.call, base_url=url, session=session, timeout=60, allow_redirects=False)
    each = -(-number // len(operations))
    for turn in range(ROUNDS):  # a route without parameters has little to ask: the others get what it leaves
        for operation in operations:
            scope = ROUTES.get((operation.method.upper(), operation.path), "admin")
            began = seen.requests
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                limit = min(number, began + (each if mode is GenerationMode.NEGATIVE else each // 2))
                act = partial(one, ids, luck, send, secrets, scope, seen)
                cases(operation, mode, limit, seen, act, seed + turn)
    return seen


def one(
    ids: list[list[str]],
    luck: random.Random,
    send: Callable[..., Any],
    secrets: dict[str, str],
    scope: str,
    seen: Seen,
    case: schemathesis.Case,
) -> None:
    """One generated case."""
    ground(case, ids, luck)
    ask(case, send, secrets, scope, seen)


def cases(
    operation: Any, mode: GenerationMode, limit: int, seen: Seen, act: Callable[[schemathesis.Case], None], seed: int
) -> None:
    """Generate cases of an operation until `limit` requests are done, or no more are found."""
    if limit <= seen.requests:
        return
    settings = hypothesis.settings(
        max_examples=limit - seen.requests,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def generated(case: schemathesis.Case) -> None:
        if seen.requests < limit:
            act(case)

    try:
        generated()
    except hypothesis.errors.Unsatisfiable:  # nothing that is invalid can be said to a route without parameters
        return


def run(folder: Path, kind: str, number: int, seed: int = 1) -> dict[str, Any]:
    """About `number` requests to a service on a database of a kind that asks everybody for a key."""
    database = databases.make(kind, folder / "database")
    free = {"THUMBWHEEL_REQUIRE_KEYS": "1", "THUMBWHEEL_KEY_RATE": "0", "THUMBWHEEL_ADDRESS_RATE": "0"}
    service = Service(database.url, folder / "service", free)
    models = folder / "service" / "models"
    models.mkdir(parents=True)
    try:
        ids = seed_answers(database.url, 200)
        secrets, store = make_keys(database.url), Store(database.url)
        promote(store, models, make_model(models, 1))
        store.close()
        service.start()
        service.wait("/readyz")
        seen = drill(service.port, number, secrets, ids, seed)
    finally:
        service.close()
        database.close()
    errors = {status: count for status, count in seen.statuses.items() if status >= "500"}
    bars = {
        "requests": seen.requests >= number,
        "server_errors": not errors,
        "unauthorised": not seen.unauthorised,
        "schema": not seen.failures,
    }
    return {
        "requests": seen.requests,
        "server_errors": sum(errors.values()),
        "unauthorised": len(seen.unauthorised),
        "contradictions": len(seen.failures),
        "statuses": dict(sorted(seen.statuses.items())),
        "examples": [*seen.unauthorised[:5], *(f"{name}: {text}" for name, text in list(seen.failures.items())[:40])],
        "missed": [name for name, holds in bars.items() if not holds],
    }
