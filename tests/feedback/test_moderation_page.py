"""The moderation page: over the application on both databases, and by mouse, keyboard and without scripts in a real chromium."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from injections import INJECTIONS, harmless
from weeks import answered, days_ago, said

from feedback import audit, cases, keys, opinions
from feedback.cases import Filter
from feedback.store import Store


def opinion(
    store: Store, subject: str = "ann", state: str = "quarantined", reason: str = "outlier", **vote: Any
) -> int:
    """An opinion of today that was moderated; returns its number."""
    about = {"prompt": vote.pop("prompt", "How are you?"), "response": vote.pop("response", "Fine.")}
    with store.write() as connection:
        id = said(connection, days_ago(0, 0.1), answered(connection, days_ago(0, 0), **about), subject, **vote)
        if state != "accepted":
            opinions.moderate(connection, id, state, reason)
    return id


def states(store: Store) -> dict[int, tuple[str, str]]:
    """number -> state and reason of every opinion."""
    with store.read() as connection:
        rows = connection.exec_driver_sql("SELECT id, moderation, moderation_reason FROM feedback ORDER BY id").all()
    return {row[0]: (row[1], row[2]) for row in rows}


def acts(store: Store) -> list[tuple[str, str]]:
    """What was judged, and to which state."""
    with store.read() as connection:
        log = audit.entries(connection)
    return [(act.target, act.after["state"]) for act in log if act.after and act.act == "feedback.moderate"]


def text(response: httpx.Response) -> str:
    """A page without the words that its scripts are given, which hold every sentence."""
    return re.sub(r'data-words="[^"]*"', "", response.text)


def form(client: TestClient, path: str = "/moderation") -> tuple[dict[str, str], str]:
    """The page's token and the values of its boxes, and the page."""
    page = text(client.get(path))
    boxes = dict(re.findall(r'name="(case-\d+)" value="(\d+)"', page))
    (token,) = set(re.findall(r'name="csrf_token" value="([^"]+)"', page))
    return {"csrf_token": token, **boxes}, page


def test_many_are_judged_at_once_and_it_is_undone(api: TestClient, store: Store) -> None:
    ids = [opinion(store, subject, value=1) for subject in ("ann", "bob", "carl")]
    fields, page = form(api)
    assert set(fields) == {"csrf_token", *(f"case-{id}" for id in ids)} and "outlier" in page
    del fields[f"case-{ids[2]}"]
    done = api.post("/moderation", data={**fields, "do": "rejected", "reason": " spam "}, follow_redirects=False)
    assert done.status_code == 303
    assert states(store) == {
        ids[0]: ("rejected", "spam"),
        ids[1]: ("rejected", "spam"),
        ids[2]: ("quarantined", "outlier"),
    }
    assert acts(store) == [(f"feedback:{ids[0]}", "rejected"), (f"feedback:{ids[1]}", "rejected")]
    page = text(api.get(done.headers["location"]))
    assert "2 rejected." in page
    (back,) = re.findall(r'value="(undo:\d+-\d+)"', page)
    undone = api.post("/moderation", data={**fields, "do": back}, follow_redirects=False)
    assert set(states(store).values()) == {("quarantined", "outlier")} and len(acts(store)) == 4
    assert "2 put in quarantine." in text(api.get(undone.headers["location"]))
    again = api.post("/moderation", data={**fields, "do": back}, follow_redirects=False)  # nothing is left to undo
    assert len(acts(store)) == 4 and "missed=" in again.headers["location"]


def test_what_somebody_else_judged_meanwhile_is_left_alone_and_said(api: TestClient, store: Store) -> None:
    one, two = opinion(store, value=1), opinion(store, "bob", value=1)
    fields, _ = form(api)
    with store.write() as connection:
        opinions.moderate(connection, one, "rejected", "by another")
    done = text(api.post("/moderation", data={**fields, "do": "accepted", "reason": "fine"}))
    assert "left alone" in done and f'href="/moderation?only={one}"' in done and "1 accepted." in done
    assert states(store) == {one: ("rejected", "by another"), two: ("accepted", "fine")}
    # its author changed it: the moderator has not seen what it says now
    three = opinion(store, "dora", value=1)
    fields, _ = form(api)
    with store.write() as connection:
        (where,) = connection.exec_driver_sql(f"SELECT completion_id FROM feedback WHERE id = {three}").all()
        said(connection, days_ago(0, 0.2), where[0], "dora", value=-1)
    api.post("/moderation", data={**fields, "do": "accepted"})
    assert states(store)[three] == ("quarantined", "outlier")


def test_without_a_reason_a_selection_or_the_token_nothing_is_done(api: TestClient, store: Store) -> None:
    id = opinion(store, value=1)
    fields, _ = form(api)
    token = {"csrf_token": fields["csrf_token"]}
    refused = api.post("/moderation", data={**fields, "do": "rejected", "reason": " "})
    assert refused.status_code == 422 and "a reason is needed" in text(refused)
    assert re.search(rf'name="case-{id}" value="\d+" checked', refused.text)  # what was ticked stays so
    assert "Nothing is selected" in text(api.post("/moderation", data={**token, "do": "accepted"}))
    assert "cannot be kept" in text(api.post("/moderation", data={**fields, "do": "rejected", "reason": "\0"}))
    assert api.post("/moderation", data={**fields, "do": "erased"}).status_code == 422
    assert api.post("/moderation", data={**token, "do": "rejected:rater", "reason": "x"}).status_code == 422
    forged = {**fields, "do": "accepted", "csrf_token": "0" * 32}
    assert api.post("/moderation", data=forged).status_code == 403
    assert states(store) == {id: ("quarantined", "outlier")} and acts(store) == []


def test_all_of_one_rater_are_judged_at_once(api: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [opinion(store, "bot", "accepted", value=1) for _ in range(5)]
    other = opinion(store, "ann", "accepted", value=1)
    kept = opinion(store, "bot", "rejected", "before", value=1)
    path = f"/moderation?state=accepted&rater={mine[0]}"
    fields, page = form(api, path)
    assert f'name="case-{other}"' not in page and "bot" not in re.sub("<[^>]+>", "", page).split()
    asked = {"csrf_token": fields["csrf_token"], "state": "accepted", "rater": str(mine[0]), "reason": "a bot"}
    monkeypatch.setattr(cases, "AT_ONCE", 3)
    monkeypatch.setattr(cases, "PART", 2)  # others write in between
    first = text(api.post("/moderation", data={**asked, "do": "rejected:rater"}))
    (back,) = re.findall(r'value="(undo:\d+-\d+)"', first)
    api.post("/moderation", data={**asked, "do": back})
    assert set(states(store).values()) == {("accepted", ""), ("rejected", "before")}
    api.post("/moderation", data={**asked, "do": "rejected:rater"})
    assert "3 rejected." in first and "There are more of this rater" in first
    second = text(api.post("/moderation", data={**asked, "do": "rejected:rater"}))
    assert "2 rejected." in second and "There are more" not in second
    told = states(store)
    assert len(acts(store)) == 11  # three, back again, three, two
    assert {told[id] for id in mine} == {("rejected", "a bot")}
    assert (told[other], told[kept]) == (("accepted", ""), ("rejected", "before"))


def test_filters_and_pages(store: Store, api: TestClient) -> None:
    waiting = [
        opinion(store, f"rater {n}", ("pending", "quarantined")[n % 2], f"why {n % 3}", value=1) for n in range(45)
    ]
    edit = opinion(store, "ann", kind="edit", value=1, correction="better", source="human_expert")
    done = [opinion(store, f"r{n}", "rejected", "spam", value=1) for n in range(3)]

    def found(**wanted: Any) -> list[int]:
        with store.read() as connection:
            return [case.opinion.id for case in cases.find(connection, Filter(**wanted))[0]]

    pages, after = [], 0
    while page := found(after=after):
        pages.append(page)
        after = page[-1]
    assert [len(page) for page in pages] == [20, 20, 6] and [*pages[0], *pages[1], *pages[2]] == [*waiting, edit]
    assert found(state="pending") == waiting[::2][:20] and found(kind="edit") == [edit]
    assert found(source="human_expert") == [edit] and found(reason="why 1") == waiting[1::3]
    assert found(state="rejected") == done[::-1] and found(state="rejected", after=done[1]) == done[:1]
    assert found(only=done[0]) == [done[0]] and found(rater=edit) == [edit] and found(rater=10**15) == []
    page = text(api.get("/moderation?state=nothing&kind=x&rater=y&after=-1&acted=1-99999999999&missed=x"))
    assert page.count('<article class="card case"') == 20 and 'rel="next"' in page
    further = re.search(r'rel="next" href="([^"]+)"', page)
    assert further and f'name="case-{waiting[20]}"' in api.get(further[1].replace("&amp;", "&")).text


def test_only_so_many_accepted_opinions_are_searched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [opinion(store, f"r{n}", "accepted", value=1) for n in range(6)]
    monkeypatch.setattr(cases, "LOOK", 4)
    with store.read() as connection:
        assert [case.opinion.id for case in cases.find(connection, Filter("accepted"))[0]] == ids[:1:-1]


def test_the_page_names_raters_by_pseudonyms_and_shows_what_happened(api: TestClient, store: Store) -> None:
    subject = "5ec7e7" * 5 + "ab"
    one, two = (opinion(store, subject, value=-1, comment="why not") for _ in range(2))
    fields, page = form(api)
    names = re.findall(r"Rater <code>([0-9a-f]+)</code>", page)
    assert len(names) == 2 and len(set(names)) == 1 and len(names[0]) == 8
    assert subject not in page and subject[:8] not in page and names[0] not in subject
    api.post("/moderation", data={"csrf_token": fields["csrf_token"], "do": f"accepted:{one}-{fields[f'case-{one}']}"})
    page = text(api.get(f"/moderation?only={one}"))
    history = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page[page.index("What happened to it (4)") :]))
    for step in (
        "Said: Bad answer “why not”",
        "Moderated: In quarantine outlier",
        "Moderated: Accepted",
        "→ Accepted",
    ):
        assert step in history
    log = text(api.get("/moderation/audit"))
    assert f'href="/moderation?only={one}"' in log and "feedback.moderate" in log and f"only={two}" not in log


def test_a_moderator_sees_judgements_in_the_log_and_only_an_admin_all(api: TestClient, store: Store) -> None:
    with store.write() as connection:
        headers = {}
        for scopes in (["moderate"], ["moderate", "admin"], ["read"]):
            _, secret = keys.create(connection, "-".join(scopes), scopes, "command:ann")
            headers[scopes[-1]] = {"Authorization": f"Bearer {secret}"}
    assert "key.create" not in api.get("/moderation/audit", headers=headers["moderate"]).text
    everything = api.get("/moderation/audit", headers=headers["admin"]).text
    assert everything.count("key.create") == 3 and "command:ann" in everything
    for path in ("/moderation", "/moderation/audit"):
        assert api.get(path, headers=headers["read"]).status_code == 403
    assert api.get("/dashboard", headers=headers["read"]).status_code == 200
    assert api.get("/dashboard", headers=headers["moderate"]).status_code == 403


def test_a_comparison_and_a_ranking_are_shown_with_all_their_answers(api: TestClient, store: Store) -> None:
    with store.write() as connection:
        ids = [answered(connection, days_ago(0, 0), response=text) for text in ("left one", "right one", "third one")]
        pair = said(connection, days_ago(0, 0), ids[0], "ann", kind="comparison", other=ids[1], value=-1, strength=2.0)
        ranked = [{"completion_id": id, "rank": rank, "position": 0} for rank, id in zip((2, 1, 3), ids, strict=True)]
        order = said(connection, days_ago(0, 0), ids[0], "bob", kind="ranking", other="x" * 8, value=1, ranked=ranked)
        for id in (pair, order):
            opinions.moderate(connection, id, "pending", "look")
        pair_case, order_case = cases.find(connection, Filter())[0]
    assert [(shown.response, shown.place) for shown in pair_case.answers] == [
        ("left one", "worse"),
        ("right one", "better"),
    ]
    assert [(s.response, s.place) for s in order_case.answers] == [
        ("left one", "2"),
        ("right one", "1"),
        ("third one", "3"),
    ]
    page = text(api.get("/moderation"))
    assert "Clearly better" in page and "Answer · preferred" in page and "Answer · rank 3" in page


def test_what_was_erased_is_shown_without_words_and_cannot_be_judged(api: TestClient, store: Store) -> None:
    id = opinion(store, "ann", kind="edit", value=1, correction="my own words")
    store.erase("ann")
    page = text(api.get(f"/moderation?only={id}"))
    assert "Erased" in page and "my own words" not in page and f'name="case-{id}"' not in page
    assert text(api.get("/moderation")).count('class="card case"') == 0


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def desk(parrot: Any) -> Any:
    """The service, with three opinions that wait and nothing else."""
    with parrot.store.write() as connection:
        for id, state in list(states(parrot.store).items()):
            if state[0] != "accepted":
                opinions.moderate(connection, id, "accepted", "")
    parrot.waiting = [
        opinion(parrot.store, subject, value=-1, comment=f"from {subject}") for subject in ("a", "b", "c")
    ]
    return parrot


def state_of(desk: Any) -> list[tuple[str, str]]:
    """State and reason of the three."""
    return [states(desk.store)[id] for id in desk.waiting]


HELD = ("quarantined", "outlier")


@pytest.mark.browser
def test_moderation_by_mouse(visit: Any, desk: Any) -> None:
    tab = visit(f"{desk.url}/moderation")
    assert tab.locator(".case .comment").all_inner_texts() == ["from a", "from b", "from c"]
    tab.locator(".case").nth(1).get_by_role("button", name="Accept").click()
    tab.get_by_text("1 accepted.").wait_for()
    assert state_of(desk) == [HELD, ("accepted", ""), HELD]
    for box in tab.get_by_role("checkbox", name=re.compile("#")).all():
        box.check()
    assert tab.locator("#number").inner_text() == "2"
    tab.get_by_role("group", name="selected").get_by_role("button", name="Reject").click()
    assert tab.evaluate("document.activeElement.id") == "reason"  # first say why
    tab.get_by_label("Reason").last.fill("manipulated votes")
    tab.get_by_role("group", name="selected").get_by_role("button", name="Reject").click()
    tab.get_by_text("2 rejected.").wait_for()
    assert tab.get_by_text("Nothing waits. Well done.").is_visible()
    tab.get_by_role("button", name="Undo").click()
    tab.get_by_text("2 put in quarantine.").wait_for()
    assert state_of(desk) == [HELD, ("accepted", ""), HELD] and tab.complaints == []


@pytest.mark.browser
def test_moderation_by_keyboard_alone(visit: Any, desk: Any) -> None:
    tab = visit(f"{desk.url}/moderation")
    press = tab.keyboard.press

    def told(text: str) -> None:
        """Until the page says so, and its keys listen."""
        tab.get_by_text(text).wait_for()
        tab.locator("#help").wait_for()

    tab.locator("#help").wait_for()
    press("j")
    press("j")
    press("r")
    tab.keyboard.type("spam, a q j r in it")  # the keys rest while one writes
    press("Enter")
    told("1 rejected.")
    assert state_of(desk)[1] == ("rejected", "spam, a q j r in it")
    assert tab.evaluate("document.activeElement.id") == f"case-{desk.waiting[2]}"  # at the same place as before
    press("k")
    press("x")
    press("j")
    press("x")
    press("a")
    told("2 accepted.")
    assert [state for state, _ in state_of(desk)] == ["accepted", "rejected", "accepted"]
    press("z")
    told("2 put in quarantine.")
    press("j")
    press("q")
    tab.keyboard.type("another look")
    press("Enter")
    told("1 put in quarantine.")
    assert state_of(desk)[0] == ("quarantined", "another look")
    press("?")
    assert tab.get_by_role("dialog", name="Keyboard shortcuts").is_visible() and tab.complaints == []


@pytest.mark.browser
def test_moderation_without_scripts_in_chinese_on_a_phone(visit: Any, desk: Any) -> None:
    size = {"width": 360, "height": 740}
    tab = visit(f"{desk.url}/moderation?lang=zh", java_script_enabled=False, viewport=size, color_scheme="dark")
    assert tab.locator("h1").inner_text() == "审核"
    tab.locator(".case").first.get_by_role("button", name="拒绝").click()
    tab.get_by_text("请写明理由").wait_for()
    assert tab.get_by_role("checkbox", name=f"#{desk.waiting[0]}").is_checked()
    tab.get_by_label("理由").last.fill("垃圾内容")
    tab.locator(".case").first.get_by_role("button", name="拒绝").click()
    tab.get_by_text("1 条已拒绝。").wait_for()
    assert state_of(desk)[0] == ("rejected", "垃圾内容")
    tab.get_by_role("button", name="撤销").click()
    tab.get_by_text("1 条已隔离。").wait_for()
    tab.get_by_role("link", name="该评价者的全部").first.click()
    assert tab.locator(".case").count() == 1
    for path in ("/moderation", "/moderation/audit"):
        wide = visit(f"{desk.url}{path}", viewport=size)
        assert wide.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path


@pytest.mark.browser
def test_nothing_that_people_wrote_runs_before_a_moderator(visit: Any, desk: Any) -> None:
    attacks = [attack.replace("\0", "") for attack in INJECTIONS]
    words = "\n".join(attacks)
    opinion(desk.store, "evil", value=1, prompt=words, response=words, comment=words, reason=attacks[0], reasons=["x"])
    opinion(desk.store, "evil", kind="edit", value=1, correction=words, reason=words[:900])
    tab = visit(f"{desk.url}/moderation")
    assert tab.locator(".comment", has_text="alert").first.text_content() == words
    assert tab.locator(".correction").first.text_content() == words
    for summary in tab.locator("summary").all():
        summary.click()
    harmless(tab, desk.url)
    tab.get_by_label("Reason").last.fill(attacks[1])
    tab.locator(".case").last.get_by_role("button", name="Reject").click()
    tab.get_by_text("1 rejected.").wait_for()
    for path in ("/moderation?state=rejected", "/moderation/audit"):
        tab.goto(desk.url + path)
        harmless(tab, desk.url)
    tab.goto(desk.url + "/moderation?why=" + httpx.QueryParams({"x": attacks[31]})["x"].replace("#", ""))
    harmless(tab, desk.url)


@pytest.mark.browser
def test_who_may_not_moderate_is_sent_to_what_they_may_see(visit: Any, parrot_with: Any) -> None:
    server = parrot_with({"THUMBWHEEL_REQUIRE_KEYS": "1"})
    with server.store.write() as connection:
        _, reader = keys.create(connection, "reader", ["read"], "command:test")
    tab = visit(f"{server.url}/moderation")
    assert tab.url == f"{server.url}/signin"
    tab.locator("input[name=key]").fill(reader)
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/dashboard")
    assert tab.get_by_role("navigation").get_by_role("link").all_inner_texts() == ["Dashboard"]
    for path in ("/moderation", "/moderation/audit"):
        tab.goto(server.url + path)
        assert tab.url == f"{server.url}/dashboard"
