"""Who may do what: keys, scopes of all routes, sessions, other sites' pages, limits. The real application, in process."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from feedback import access, keys, sessions
from feedback.access import OPEN, PAGES, ROUTES
from feedback.engine import DecoderEngine
from feedback.identity import Identity
from feedback.limits import BUCKETS, Buckets, address_name
from feedback.service import create_app
from feedback.settings import Settings
from feedback.store import Store

SECRET = b"the test's own secret key"
Open = Callable[..., TestClient]


def application(folder: Path, settings: Settings, keys_needed: bool) -> FastAPI:
    """The real application on SQLite; no model, so the engine's worker never starts."""
    url = f"sqlite:///{folder}/feedback.db"
    return create_app(
        url, folder / "models", DecoderEngine(), secret=SECRET, settings=settings, keys_needed=keys_needed
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Open]:
    """Start the application with settings; returns a client of it, whose address can be chosen."""
    with ExitStack() as stack:

        def opened(
            keys_needed: bool = True, address: str = "127.0.0.1", scheme: str = "http", **values: Any
        ) -> TestClient:
            app = application(tmp_path, Settings(**values), keys_needed)
            client = TestClient(app, f"{scheme}://localhost", client=(address, 5000), follow_redirects=False)
            return stack.enter_context(client)

        yield opened


def make_key(client: TestClient, *scopes: str, name: str = "app", days: float | None = None) -> dict[str, str]:
    """The header of a new key."""
    with client.app.state.service.store.write() as connection:  # type: ignore[attr-defined]
        _, secret = keys.create(connection, name, list(scopes), "command:test", days)
    return {"Authorization": f"Bearer {secret}"}


def all_routes(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything that the application answers."""
    found = []
    for route in iter_route_contexts(app.routes):
        assert route.path is not None
        found += [(method, route.path) for method in route.methods or () if method != "HEAD"]
    return found


def code(response: Any) -> tuple[int, str]:
    """Status and OpenAI's error code; the whole shape is checked."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


# ---------------------------------------------------------------- routes


def test_every_route_declares_the_scope_that_it_needs(tmp_path: Path) -> None:
    declared, found = set(ROUTES), set(all_routes(application(tmp_path, Settings(), True)))
    assert found - declared == set(), "routes that need a line in access.ROUTES"
    assert declared - found == set(), "lines of access.ROUTES without a route"
    assert set(ROUTES.values()) <= {OPEN, *keys.SCOPES}
    assert access.needed("POST", "/v1/something/new") == ("admin", "")  # what nobody declared is not open


def test_each_route_refuses_every_wrong_scope_and_nobody_in_particular(start: Open) -> None:
    client = start()
    only = {scope: make_key(client, scope) for scope in keys.SCOPES}
    for (method, template), needed in ROUTES.items():
        path = re.sub(r"\{\w+\}", "1", template)
        client.cookies.clear()
        if needed == OPEN:
            assert client.request(method, path).status_code != 401, (method, path)
            continue
        nobody = client.request(method, path)
        if method == "GET" and path in PAGES:
            assert (nobody.status_code, nobody.headers["location"]) == (303, "/signin")
        else:
            assert code(nobody) == (401, "invalid_api_key")
        for scope, header in only.items():
            response = client.request(method, path, headers=header)
            if scope == needed:
                assert response.status_code not in (401, 403), (method, path, scope)
            else:
                assert code(response) == (403, "insufficient_scope"), (method, path, scope)


# ---------------------------------------------------------------- keys


def test_a_key_is_kept_as_its_hash_and_opens_until_it_is_revoked_or_expires(store: Store) -> None:
    import hashlib

    import sqlalchemy as sa

    with store.write() as connection:
        key, secret = keys.create(connection, "app", ["rate", "chat"], "command:ann")
        brief, _ = keys.create(connection, "brief", ["read"], "command:ann", days=1e-6)
        row = connection.execute(sa.select(keys.table)).first()
    assert row is not None and row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in str(row) and secret.startswith("tw_") and len(secret) >= 43
    assert row.scopes == ["chat", "rate"]
    time.sleep(0.1)
    with store.write() as connection:
        found = keys.find(connection, hashlib.sha256(secret.encode()).hexdigest())
        assert found == key and keys.any_works(connection)
        assert keys.find(connection, "0" * 64) is None
        revoked = keys.revoke(connection, key.id, "command:bob")
        again = keys.revoke(connection, key.id, "command:carl")
        assert again.revoked_at == revoked.revoked_at and revoked.problem(revoked.created_at) == "revoked"
        assert not keys.any_works(connection)  # the other one has expired
        with pytest.raises(KeyError, match="no key 99"):
            keys.revoke(connection, 99, "command:bob")
    assert brief.expires_at is not None and brief.problem(brief.expires_at) == "expired"


def test_keys_that_open_nothing_are_not_made(store: Store) -> None:
    cases: list[tuple[str, list[str], float | None, str]] = [
        ("", ["chat"], None, "1 to 64"),
        ("a\nb", ["chat"], None, "printable"),
        ("x", [], None, "without a scope"),
        ("x", ["chat", "fly"], None, "no scope fly"),
        ("x", ["chat"], 0, "more than 0"),
    ]
    with store.write() as connection:
        for name, scopes, days, match in cases:
            with pytest.raises(ValueError, match=match):
                keys.create(connection, name, scopes, "command:ann", days)
        assert keys.listed(connection) == []


def test_the_audit_and_the_key_are_one_transaction(store: Store) -> None:
    from feedback import audit

    with pytest.raises(RuntimeError), store.write() as connection:
        keys.create(connection, "lost", ["chat"], "command:ann")
        raise RuntimeError("the machine stumbles")
    with store.write() as connection:
        assert audit.entries(connection) == [] and keys.listed(connection) == []
        key, _ = keys.create(connection, "app", ["chat"], "command:ann")
        keys.revoke(connection, key.id, "command:bob")
        made, revoked = audit.entries(connection)
        assert (made.actor, made.act, made.target, made.before) == (
            "command:ann",
            "key.create",
            f"key:{key.id}",
            None,
        )
        assert made.after == {"name": "app", "scopes": ["chat"], "expires_at": None}
        assert (revoked.actor, revoked.act, revoked.before) == ("command:bob", "key.revoke", {"revoked_at": None})
        assert audit.entries(connection, after_id=made.id) == [revoked]
        assert audit.entries(connection, target="key:77") == []


def test_bad_keys_are_told_why(start: Open) -> None:
    client = start()
    good = make_key(client, "chat")
    assert client.get("/v1/models", headers=good).status_code == 200
    for header in ("Bearer tw_wrong", "Basic abc", "Bearer ", "tw_wrong"):
        response = client.get("/v1/models", headers={"Authorization": header})
        assert code(response) == (401, "invalid_api_key") and response.headers["WWW-Authenticate"] == "Bearer"


def test_a_revoked_key_stops_within_seconds_and_its_use_was_noted(start: Open) -> None:
    client = start()
    header = make_key(client, "chat")
    store: Store = client.app.state.service.store  # type: ignore[attr-defined]
    assert client.get("/v1/models", headers=header).status_code == 200
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with store.read() as connection:
            (key,) = keys.listed(connection)
        if key.last_used_at is not None:
            break
        time.sleep(0.02)
    assert key.last_used_at is not None
    with store.write() as connection:
        keys.revoke(connection, key.id, "command:test")
    time.sleep(access.REMEMBER_SECONDS + 0.1)
    refused = client.get("/v1/models", headers=header)
    assert code(refused) == (401, "invalid_api_key") and "revoked" in refused.json()["error"]["message"]


# ---------------------------------------------------------------- loopback and proxies


def test_loopback_needs_no_key_unless_it_is_told_to_or_a_proxy_is_seen(start: Open) -> None:
    plain = start(keys_needed=False)
    assert plain.get("/v1/feedback").status_code == 200
    # what openai's client must have: any key will do where none is asked for; one of ours is checked all the same
    assert plain.get("/v1/models", headers={"Authorization": "Bearer sk-anything"}).status_code == 200
    assert plain.get("/v1/models", headers={"Authorization": "Bearer tw_wrong"}).status_code == 401
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Proto"):
        assert code(plain.get("/v1/feedback", headers={name: "1.2.3.4"})) == (401, "invalid_api_key")
    for values in ({"require_keys": True}, {"public_names": "localhost"}):
        assert code(start(keys_needed=False, **values).get("/v1/feedback")) == (401, "invalid_api_key")


def test_people_of_two_keys_are_never_the_same_and_a_renewed_key_speaks_for_the_same(
    start: Open, answer_into: Any
) -> None:
    identity = Identity(SECRET)
    client = start()
    first, renewed, other = (make_key(client, "rate", name=name) for name in ("app", "app", "another"))
    store: Store = client.app.state.service.store  # type: ignore[attr-defined]
    answer_into(store)(id="chatcmpl-1")
    for header in (first, renewed, other):
        client.put("/v1/feedback/chatcmpl-1/thumb", json={"value": 1, "user": "7"}, headers=header)
    seen = [event.subject for event in store.events()]
    assert seen == [identity.subject("key", "app", "7"), identity.subject("key", "another", "7")]
    assert identity.subject("user", "7") not in seen


def test_an_expert_needs_the_scope_label(start: Open) -> None:
    client = start()
    thumb = {"value": 1, "source": "human_expert"}
    url = "/v1/feedback/chatcmpl-1/thumb"
    assert code(client.put(url, json=thumb, headers=make_key(client, "rate"))) == (403, "insufficient_scope")
    allowed = client.put(url, json=thumb, headers=make_key(client, "rate", "label"))
    assert code(allowed) == (404, "completion_not_found")


def test_a_feedback_token_opens_one_answer_without_a_key(start: Open) -> None:
    client = start()
    identity = Identity(SECRET)
    token = {"X-Thumbwheel-Feedback-Token": identity.token("chatcmpl-1", "ann")}
    put = client.put("/v1/feedback/chatcmpl-1/thumb", json={"value": 1}, headers=token)
    assert code(put) == (404, "completion_not_found")  # through the door; there is no such answer
    other = client.put("/v1/feedback/chatcmpl-2/thumb", json={"value": 1}, headers=token)
    assert code(other) == (403, "invalid_feedback_token")
    assert client.get("/v1/feedback", headers=token).status_code == 401
    assert client.get("/v1/models", headers=token).status_code == 401


# ---------------------------------------------------------------- sessions


def sign_in(client: TestClient, header: dict[str, str]) -> Any:
    """Fill in the form of /signin, as a browser without JavaScript would."""
    page = client.get("/signin").text
    token = page.split('name="csrf_token" value="')[1].split('"')[0]
    secret = header["Authorization"].removeprefix("Bearer ")
    return client.post("/signin", data={"csrf_token": token, "key": secret})


def test_the_page_asks_to_sign_in_and_a_key_becomes_a_session(start: Open) -> None:
    client = start()
    assert (client.get("/").status_code, client.get("/").headers["location"]) == (303, "/signin")
    failed = sign_in(client, {"Authorization": "Bearer tw_wrong"})
    assert failed.status_code == 401 and "opens nothing" in failed.text
    header = make_key(client, "chat", "rate")
    assert sign_in(client, header).headers["location"] == "/"
    assert client.get("/").status_code == 200
    assert client.get("/v1/models").status_code == 200
    assert code(client.get("/v1/feedback")) == (403, "insufficient_scope")
    with client.app.state.service.store.write() as connection:  # type: ignore[attr-defined]
        keys.revoke(connection, 1, "command:test")
    time.sleep(access.REMEMBER_SECONDS + 0.1)
    assert client.get("/v1/models").status_code == 401
    token = client.get("/signin").text.split('name="csrf_token" value="')[1].split('"')[0]
    assert client.post("/signout", data={"csrf_token": "wrong"}).status_code == 403
    assert client.post("/signout", data={"csrf_token": token}).headers["location"] == "/signin"
    assert sessions.COOKIE not in client.cookies


def test_visitors_may_do_what_the_setting_says_and_rate_with_their_token_only(start: Open) -> None:
    client = start(visitor_scopes="chat, rate")
    assert code(client.get("/v1/models")) == (401, "invalid_api_key")  # no session yet
    assert client.get("/").status_code == 200
    assert client.get("/v1/models").status_code == 200
    url, same = "/v1/feedback/chatcmpl-1/thumb", {"Sec-Fetch-Site": "same-origin"}
    assert code(client.put(url, json={"value": 1}, headers=same)) == (403, "feedback_token_required")
    with pytest.raises(ValueError, match="not admin"):
        Settings(visitor_scopes="admin")


def test_the_cookie_is_signed_and_secure_over_tls(start: Open) -> None:
    plain = start(visitor_scopes="chat").get("/").headers["set-cookie"].lower()
    assert "httponly" in plain and "samesite=lax" in plain and "secure" not in plain
    over_tls = start(visitor_scopes="chat", scheme="https")
    assert "secure" in over_tls.get("/").headers["set-cookie"].lower()
    identity = Identity(SECRET)
    value = sessions.pack(identity, sessions.Session("ann", 3), now=0)
    assert sessions.unpack(identity, value, now=364 * 86400) == sessions.Session("ann", 3)
    assert sessions.unpack(identity, value, now=366 * 86400) is None
    for forged in (value.replace(".3.", ".4."), value[:-1], "", "a.b.c.d", None, "é.1.2.3", value + "."):
        assert sessions.unpack(identity, forged, now=0) is None
    assert sessions.unpack(Identity(b"another secret key"), value, now=0) is None


def test_writes_that_another_sites_page_asks_for_are_refused(start: Open) -> None:
    url, thumb = "/v1/feedback/chatcmpl-1/thumb", {"value": 1}
    refused = (403, "cross_site_request")
    for client in (start(keys_needed=False), start(visitor_scopes="rate chat")):
        client.get("/")
        identity = client.app.state.service.identity  # type: ignore[attr-defined]
        session = sessions.unpack(identity, client.cookies[sessions.COOKIE])
        assert session is not None
        for bad in (
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {},
            {"X-CSRF-Token": "wrong"},
        ):
            assert code(client.put(url, json=thumb, headers=bad)) == refused, bad
        for good in (
            {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"},
            {"Origin": "http://localhost"},
            {"X-CSRF-Token": sessions.csrf_token(identity, session)},
        ):
            assert code(client.put(url, json=thumb, headers=good)) != refused, good
    alone = start(keys_needed=False)  # a program, without a cookie
    assert code(alone.put(url, json=thumb))[0] == 404
    assert code(alone.put(url, json=thumb, headers={"Sec-Fetch-Site": "cross-site"})) == refused
    keyed = start()
    header = {**make_key(keyed, "rate"), "Origin": "http://evil.example"}
    assert code(keyed.put(url, json=thumb, headers=header))[0] == 404  # a key is not sent by a browser of itself


def test_cors_is_off_unless_origins_are_listed(start: Open) -> None:
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    closed = start(keys_needed=False).options("/v1/chat/completions", headers=ask)
    assert "access-control-allow-origin" not in closed.headers
    client = start(keys_needed=False, cors_origins="https://app.example")
    opened = client.options("/v1/chat/completions", headers=ask)
    assert opened.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in opened.headers
    other = client.options("/v1/chat/completions", headers={**ask, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    with pytest.raises(ValueError, match="no origin"):
        Settings(cors_origins="app.example")


def test_names_are_checked(start: Open) -> None:
    client = start(keys_needed=False)
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    public = start(public_names="chat.example *.inner.example")
    for host, status in (("chat.example", 200), ("a.inner.example", 200), ("127.0.0.1", 200), ("evil.example", 400)):
        assert public.get("/healthz", headers={"Host": host}).status_code == status


# ---------------------------------------------------------------- limits


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    now = [0.0]
    buckets = Buckets(rate=2.0, burst=3, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b") == 0  # another caller
    now[0] = 0.25
    assert buckets.take("a") == 0.25
    now[0] = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    now[0] = 1000.0
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]  # never more than the burst
    assert [Buckets(0, 1).take("a") for _ in range(5)] == [0] * 5
    small = Buckets(1.0, 1, clock=lambda: 0.0)
    for n in range(BUCKETS + 10):
        small.take(str(n))
    assert small.take(str(BUCKETS + 9)) == 1 and small.take("0") == 0  # memory is bounded: the oldest was forgotten


def test_addresses_of_one_network_are_one_caller() -> None:
    assert address_name("2001:db8:1:2:3::4") == address_name("2001:db8:1:2:ffff::1") == "2001:db8:1:2::/64"
    assert address_name("::ffff:10.0.0.1") == address_name("10.0.0.1") == "10.0.0.1"
    assert address_name("testclient") == "testclient"


def test_too_many_requests_are_told_when_to_come_back(start: Open) -> None:
    client = start(key_rate=0.5, key_burst=2, address_rate=0.1, address_burst=3)
    header, other = make_key(client, "chat"), make_key(client, "chat")
    statuses = [client.get("/v1/models", headers=header).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    limited = client.get("/v1/models", headers=header)
    assert code(limited) == (429, "rate_limit_exceeded") and limited.headers["Retry-After"] in ("1", "2")
    assert client.get("/v1/models", headers=other).status_code == 200
    guesses = [client.get("/v1/models", headers={"Authorization": f"Bearer tw_{n}"}).status_code for n in range(3)]
    assert guesses == [401, 429, 429]  # two keys were looked up and one guessed from this address
    free = start(keys_needed=False, address_rate=0.1, address_burst=1)
    assert {free.get("/v1/models").status_code for _ in range(20)} == {200}  # this machine is not limited


def test_a_body_is_cut_off_while_it_comes_in(start: Open) -> None:
    client = start(keys_needed=False, body_limit=2000)
    taken: list[int] = []

    def endless() -> Iterator[bytes]:
        for n in range(1000):
            taken.append(n)
            yield b"x" * 500

    url = "/v1/chat/completions"
    assert code(client.post(url, content=b"x" * 2001)) == (413, "request_too_large")
    cut = client.post(url, content=endless(), headers={"Content-Type": "application/json"})
    assert code(cut) == (413, "request_too_large")
    assert code(client.post(url, content=b"x" * 2000))[0] == 400  # not too large, no JSON either


def test_a_body_that_does_not_arrive_is_given_up(serve: Any, two_models: Any, tmp_path: Path) -> None:
    import socket
    from urllib.parse import urlparse

    env = {"THUMBWHEEL_BODY_SECONDS": "0.3", "THUMBWHEEL_BODY_LIMIT": "2000"}
    server = serve(f"sqlite:///{tmp_path}/feedback.db", two_models[0], env)
    try:
        where = urlparse(server.url)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for rest, expected in (
            ("Content-Length: 500\r\n\r\n{", b"408"),
            ("Transfer-Encoding: chunked\r\n\r\n" + ("400\r\n" + "x" * 1024 + "\r\n") * 3, b"413"),
        ):
            with socket.create_connection((where.hostname, where.port), timeout=10) as slow:
                slow.sendall((head + rest).encode())
                answer = slow.recv(65536)
                assert answer.split(b" ")[1] == expected
                assert b"connection: close" in answer.lower()
    finally:
        server.close()


def test_keys_and_audit_go_down_and_up_with_rows_in_them(store: Store, answer_into: Any) -> None:
    from feedback import audit

    id = answer_into(store)()
    with store.write() as connection:
        keys.create(connection, "app", ["chat"], "command:ann")
    store.migrate("0002")
    store.migrate()
    with store.write() as connection:
        assert keys.listed(connection) == [] and audit.entries(connection) == []
        assert keys.create(connection, "app", ["chat"], "command:ann")[0].id == 1
    assert store.completion(id) is not None  # what stood beside them is untouched
