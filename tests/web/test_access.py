"""Who gets in, who does not, and what is written down of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from dicomnode.config import parse
from dicomnode.errors import ConfigError
from dicomnode.web.access import COOKIE, operator_token
from dicomnode.web.app import create
from dicomnode.web.refusals import ATTEMPTS, IN_ALL, RECORDED, WINDOW_S
from tests.web.house import HOME, OPERATOR, VIEWER, Build, House

# --- tokens


def test_the_operators_token_is_made_at_first_start_and_others_may_not_read_it(tmp_path: Path) -> None:
    """Mode 0600 whatever the umask; the same at the next start."""
    config = parse(f'[node]\ndata_dir = "{tmp_path}"\n')
    token = operator_token(config)
    assert len(token) >= 40 and operator_token(config) == token
    assert (tmp_path / "web.token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("content", "mode", "says"), [
    (OPERATOR, 0o640, "mode 0640"), (OPERATOR, 0o604, "mode 0604"), ("short", 0o600, "is no token"),
    ("", 0o600, "empty"), ("two words in one file", 0o600, "is no token")])
def test_a_token_that_others_may_read_or_that_is_none_is_refused_at_start(tmp_path: Path, content: str, mode: int,
                                                                          says: str) -> None:
    """With the remedy, and without the token."""
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=says) as error:
        create(parse(f'[node]\ndata_dir = "{tmp_path}/data"\n[web]\ntoken_file = "{file}"\n'))
    assert "Remedy" in str(error.value) and OPERATOR not in str(error.value)


def test_two_roles_need_two_tokens(tmp_path: Path) -> None:
    """Otherwise who may look could act."""
    file = tmp_path / "token"
    file.write_text(OPERATOR)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="operators' token"):
        create(parse(f'[node]\ndata_dir = "{tmp_path}/d"\n[web]\ntoken_file = "{file}"\nviewer_token_file = "{file}"'))


# --- programs


def test_nobody_gets_in_without_a_token(house: House) -> None:
    """Pages lead to the login, programs get 401 as JSON; looking for something that is not there tells nothing more."""
    client = house.client()
    answer = client.get("/look?x=1")
    assert answer.status_code == 303 and answer.headers["Location"] == "/login?next=/look%3Fx%3D1"
    answer = client.get("/look", headers={"Authorization": "Bearer "})
    assert answer.status_code == 401 and answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["WWW-Authenticate"] == "Bearer" and answer.json()["status"] == 401
    assert client.post("/act").status_code == 401


def test_htmx_is_sent_to_the_login_with_the_whole_window(house: House) -> None:
    """The login page must not land inside a table; afterwards one is where one was."""
    answer = house.client().get("/look", headers={"HX-Request": "true", "HX-Current-URL": f"{HOME}/studies?q=1"})
    assert answer.status_code == 401 and answer.headers["HX-Redirect"] == "/login?next=/studies"
    answer = house.client().get("/look", headers={"HX-Request": "true", "HX-Current-URL": "http://["})
    assert answer.status_code == 401 and answer.headers["HX-Redirect"] == "/login"


def test_the_viewers_token_looks_and_does_not_act(house: House) -> None:
    """403 with words, and a line of history."""
    client = house.client(Authorization=f"Bearer {VIEWER}")
    assert client.get("/look").json() == {"name": "viewer"}
    answer = client.post("/act")
    assert answer.status_code == 403 and "look, not act" in answer.json()["detail"]
    assert house.recorded() == [("look-only", "127.0.0.1")]
    assert house.client(Authorization=f"Bearer {OPERATOR}").post("/act").json() == {"name": "operator"}


def test_whoever_guesses_tokens_has_to_wait(house: House) -> None:
    """After some wrong ones from an address none from there is looked at, right ones neither; others are not touched;
    after a while it may try again. Each refusal is in the history."""
    guess, right = house.client(Authorization="Bearer wrong"), house.client(Authorization=f"Bearer {OPERATOR}")
    assert [guess.get("/look").status_code for _ in range(ATTEMPTS)] == [401] * ATTEMPTS
    answer = right.get("/look")
    assert answer.status_code == 429 and 0 < int(answer.headers["Retry-After"]) <= WINDOW_S
    assert house.client().post("/login", data={"token": OPERATOR}).status_code == 429
    assert house.client(address="192.0.2.7", Authorization=f"Bearer {OPERATOR}").get("/look").status_code == 200
    house.now[0] += WINDOW_S + 1
    assert right.get("/look").status_code == 200
    assert house.recorded() == [("wrong-token", "127.0.0.1")] * ATTEMPTS


def test_a_flood_of_refusals_does_not_fill_the_history(house: House) -> None:
    """An address that goes on is written down so many times, and the last line says that no more follow."""
    client = house.client(Authorization=f"Bearer {VIEWER}")
    for _ in range(RECORDED + 30):
        client.post("/act")
    assert len(house.recorded()) == RECORDED
    assert "no more refusals" in house.app.state.site.ledger.events()[-1]["reason"]


def test_a_flood_from_many_addresses_does_not_fill_the_history_either(house: House) -> None:
    """Who has a network of addresses is written down so many times in all, also later only so many."""
    ledger, refusals = house.app.state.site.ledger, house.app.state.door.refusals
    with ledger.transaction():  # one commit for all
        for n in range(IN_ALL + 50):
            refusals.record(f"2001:db8::{n:x}", "wrong-token", "no", wrong_token=True)
    assert len(house.recorded()) == IN_ALL and "too many addresses" in ledger.events()[-1]["reason"]
    refusals.record("192.0.2.1", "wrong-token", "no", wrong_token=True)
    assert len(house.recorded()) == IN_ALL
    house.now[0] += WINDOW_S + 1
    refusals.record("192.0.2.1", "wrong-token", "no", wrong_token=True)
    assert len(house.recorded()) == IN_ALL + 1


# --- browsers


def test_a_browser_logs_in_acts_and_logs_out(house: House) -> None:
    """The cookie cannot be read by scripts nor sent from other sites; after the logout a copy is worth nothing."""
    client = house.client()
    assert "<form" in client.get("/login").text
    answer = client.post("/login", data={"token": f" {OPERATOR}\n", "next": "/studies?q=1"})
    assert answer.status_code == 303 and answer.headers["Location"] == "/studies?q=1"
    cookie = answer.headers["Set-Cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"))
    assert "Secure" not in cookie and OPERATOR not in cookie
    csrf = house.csrf(client)
    assert client.post("/act", headers={"X-CSRF-Token": csrf}).json() == {"name": "operator"}
    assert client.post("/act", data={"csrf": csrf}).status_code == 200
    copy = client.cookies[COOKIE]
    assert client.post("/logout", data={"csrf": csrf}).headers["Location"] == "/login"
    assert COOKIE not in client.cookies
    assert house.client(Cookie=f"{COOKIE}={copy}").get("/look").status_code == 303


def test_what_is_over_stays_over_after_a_restart(build: Build) -> None:
    """A session that was ended and a link that was used: the process that comes next lets neither in."""
    house = build()
    client, link = house.logged_in(), house.app.state.door.sessions.link("anna")
    copy = client.cookies[COOKIE]
    answer = client.post("/logout", data={"csrf": house.csrf(client)})
    assert answer.status_code == 303 and answer.headers["Clear-Site-Data"] == '"cache"'
    assert house.client().get("/login", params={"ticket": link}).status_code == 303
    again = build()
    assert again.client(Cookie=f"{COOKIE}={copy}").get("/look").status_code == 303
    assert again.client().get("/login", params={"ticket": link}).status_code == 401
    other = again.logged_in()
    again.app.state.site.ledger.close()  # as a disk that is full
    copy = other.cookies[COOKIE]
    again.app.state.door.sessions.end(again.app.state.door.sessions.read(copy))
    assert again.app.state.door.sessions.read(copy) is None


def test_no_request_waits_for_the_ledger_where_all_others_wait_for_it(house: House,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is written by a thread, never in the loop: a ledger that is locked for long must not stop /healthz."""
    in_loop = []

    def event(*_: Any, **about: Any) -> None:
        with suppress(RuntimeError):
            in_loop.append((asyncio.get_running_loop(), about))

    monkeypatch.setattr(house.app.state.site.ledger, "event", event)
    house.client().post("/login", data={"token": "wrong"})
    house.client().get("/login", params={"ticket": "wrong"})
    house.client(Authorization="Bearer wrong").get("/look")
    house.client(Authorization=f"Bearer {VIEWER}").post("/act")
    house.logged_in().post("/act")
    assert not in_loop


def test_the_cookie_is_secure_where_the_browser_came_by_https(build: Build) -> None:
    """Directly, or through a trusted proxy that says so."""
    house = build('hosts = ["nbd.example"]\nuser_header = "X-User"\ntrusted_proxies = ["192.0.2.1"]')
    answer = house.client(base="https://nbd.example").post("/login", data={"token": OPERATOR})
    assert "Secure" in answer.headers["Set-Cookie"]
    for address, secure in (("192.0.2.1", True), ("192.0.2.2", False)):
        answer = house.client(address=address, X_Forwarded_Proto="https").post("/login", data={"token": OPERATOR})
        assert ("Secure" in answer.headers["Set-Cookie"]) == secure


def test_a_session_runs_out(build: Build) -> None:
    """After web.session_h hours, whatever the browser keeps."""
    house = build("session_h = 2")
    client = house.logged_in()
    house.now[0] += 2 * 3600 - 1
    assert client.get("/look").status_code == 200
    house.now[0] += 1
    assert client.get("/look").status_code == 303


def test_a_cookie_cannot_be_made_or_changed(house: House) -> None:
    """Each single sign of it counts; a viewer's cannot become an operator's."""
    good = house.logged_in(VIEWER).cookies[COOKIE]
    for at in range(0, len(good), 7):
        changed = good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1:]
        answer = house.client(Cookie=f"{COOKIE}={changed}").get("/look")
        assert answer.status_code == 303, f"changed at {at}"
    for rubbish in ("x", ".", "..", "a.b.c", "A" * 5000, "%00", good.split(".")[0] + "."):
        assert house.client(Cookie=f"{COOKIE}={rubbish}").get("/look").status_code == 303


def test_another_token_ends_all_sessions(build: Build) -> None:
    """Whoever changes the token because it leaked need not wait."""
    cookie = build().logged_in().cookies[COOKIE]
    again = build()
    assert again.client(Cookie=f"{COOKIE}={cookie}").get("/look").status_code == 200, "a restart ends none"
    file = again.app.state.site.config.web.token_file
    file.write_text("another-token-of-the-operators")
    config = again.app.state.site.config
    other = create(config, clock=lambda: again.now[0])
    answer = TestClient(other, base_url=HOME, follow_redirects=False, headers={"Cookie": f"{COOKIE}={cookie}"}).get("/")
    other.state.site.ledger.close()
    assert answer.status_code == 303


def test_a_wrong_token_at_the_login_page_is_said_and_written_down(house: House) -> None:
    """In words, with the page to try again."""
    answer = house.client().post("/login", data={"token": "wrong", "next": "/nights"})
    assert answer.status_code == 401 and "not the token" in answer.text and 'value="/nights"' in answer.text
    assert house.recorded() == [("wrong-token", "127.0.0.1")]


@pytest.mark.parametrize("elsewhere", ["//evil.example", "https://evil.example/", "/\\evil.example", "javascript:1",
                                       "/login", "/a\r\nSet-Cookie: x=1", ""])
def test_the_login_leads_nowhere_else(house: House, elsewhere: str) -> None:
    """`next` is a path of ours or the front page."""
    answer = house.client().post("/login", data={"token": OPERATOR, "next": elsewhere})
    assert answer.headers["Location"] == "/"


def test_a_link_lets_in_once_and_not_for_long(house: House) -> None:
    """As the person who made it."""
    sessions = house.app.state.door.sessions
    link, late = sessions.link("anna"), sessions.link("bert")
    client = house.client()
    assert client.get("/login", params={"ticket": link}).headers["Location"] == "/"
    assert client.get("/look").json() == {"name": "anna"}
    again = house.client().get("/login", params={"ticket": link})
    assert again.status_code == 401 and "used already" in again.text
    house.now[0] += 601
    assert house.client().get("/login", params={"ticket": late}).status_code == 401
    assert house.client(Cookie=f"{COOKIE}={link}").get("/look").status_code == 303, "a link is no cookie"


# --- requests that other sites' pages make


@pytest.mark.parametrize("headers", [
    {}, {"X-CSRF-Token": "wrong"}, {"X-CSRF-Token": "\u00fc".encode("latin-1")},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1:9999"}, {"Origin": "http://["}])
def test_a_cookie_alone_changes_nothing(house: House, headers: dict[str, str]) -> None:
    """No secret, a wrong one, or the right one in a request from elsewhere: 403, and a line of history."""
    client = house.logged_in()
    secret = {"X-CSRF-Token": house.csrf(client)} if "Sec-Fetch-Site" in headers or "Origin" in headers else {}
    assert client.post("/act", headers=secret | headers).status_code == 403
    assert house.recorded() == [("csrf", "127.0.0.1")]


def test_the_secret_belongs_to_its_session(house: House) -> None:
    """That of another session, or of the same person before, does not help."""
    first, second = house.logged_in(), house.logged_in()
    assert second.post("/act", headers={"X-CSRF-Token": house.csrf(first)}).status_code == 403
    same = {"X-CSRF-Token": house.csrf(second), "Sec-Fetch-Site": "same-origin", "Origin": HOME}
    assert second.post("/act", headers=same).status_code == 200


def test_another_site_cannot_log_a_browser_in(house: House) -> None:
    """Or a person would work as somebody else without knowing."""
    answer = house.client().post("/login", data={"token": OPERATOR}, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403 and "Set-Cookie" not in answer.headers


# --- what every request passes and every answer carries


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1:8811", 200), ("localhost", 200), ("[::1]:8811", 200), ("192.0.2.77", 200), ("NBD.Example:443", 200),
    ("evil.example", 400), ("127.0.0.1.evil.example", 400), ("", 400), ("[", 400), ("evil.example@127.0.0.1:x", 400)])
def test_only_our_own_names_are_answered(build: Build, host: str, status: int) -> None:
    """A page elsewhere whose name is turned to our address cannot read ours (DNS rebinding)."""
    client = build('hosts = ["nbd.example"]').client(Authorization=f"Bearer {OPERATOR}")
    assert client.get("/look", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("path", ["/", "/login", "/look", "/nothing", "/fail", "/static/style.css", "/static/none",
                                  "/api/openapi.json", "/api/nothing"])
def test_every_answer_carries_the_same_protection(house: House, path: str) -> None:
    """Pages, errors, files and JSON alike."""
    for client in (house.client(), house.logged_in()):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin" and "camera=()" in headers["Permissions-Policy"]
        assert headers["Cache-Control"] == ("no-cache" if path == "/static/style.css" else "no-store")


def test_a_request_may_not_be_large(house: House) -> None:
    """Announced or not."""
    client = house.client()
    assert client.post("/login", data={"token": "x" * 70_000}).status_code == 413
    assert client.post("/login", content=iter([b"token=" + b"x" * 40_000] * 3),
                       headers={"Content-Type": "application/x-www-form-urlencoded"}).status_code == 413
    assert client.post("/login", content=b"", headers={"Content-Length": "-1"}).status_code in (400, 413)


def test_an_error_says_what_to_do_and_nothing_of_the_inside(house: House) -> None:
    """A page for people, JSON for programs; the traceback is for the log."""
    answer = house.logged_in().get("/fail")
    assert answer.status_code == 500 and "What to do:" in answer.text
    assert "inner words" not in answer.text and "Traceback" not in answer.text
    answer = house.client(Authorization=f"Bearer {OPERATOR}").get("/fail")
    assert answer.json()["status"] == 500 and answer.json()["remedy"] and "inner words" not in answer.text


def test_what_is_not_there_is_said_with_a_way_on(house: House) -> None:
    """Whoever is logged in keeps the menu; a stranger sees none."""
    text = house.logged_in().get("/nothing<b>").text
    assert "/nothing&lt;b&gt;" in text and "front page" in text and "Log out" in text
    assert "Log out" not in house.client().get("/nothing").text


def test_a_damaged_ledger_is_said_in_words(house: House) -> None:
    """Status 503, with the remedy, on pages and in JSON."""
    client = house.logged_in()
    house.app.state.site.ledger.close()
    assert client.get("/").status_code == 503 and "dicomnode repair" in client.get("/").text
