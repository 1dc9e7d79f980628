"""Who gets in, who does not, and what is written down of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from dicomnode.config import parse
from dicomnode.errors import ConfigError
from dicomnode.web.access import COOKIE, Operator, Viewer, operator_token
from dicomnode.web.app import create
from dicomnode.web.refusals import ATTEMPTS, RECORDED, WINDOW_S

OPERATOR, VIEWER = "an-operators-token-1234", "a-viewers-token-5678"
HOME = "http://127.0.0.1"


@dataclass
class House:
    """An empty node's application with two routes to try: GET /look and POST /act."""

    app: FastAPI
    now: list[float]

    def client(self, *, address: str = "127.0.0.1", base: str = HOME, **headers: str) -> TestClient:
        return TestClient(self.app, base_url=base, headers={name.replace("_", "-"): value for name, value in
                                                            headers.items()},
                          follow_redirects=False, client=(address, 50000))

    def logged_in(self, token: str = OPERATOR, **options: Any) -> TestClient:
        client = self.client(**options)
        assert client.post("/login", data={"token": token}).status_code == 303
        return client

    def csrf(self, client: TestClient) -> str:
        found = re.search(r'"X-CSRF-Token": "([^"]+)"', client.get("/").text)
        assert found is not None
        return found[1]

    def recorded(self) -> list[tuple[str, str]]:
        return [(event["code"], event["actor"]) for event in self.app.state.site.ledger.events()
                if event["kind"] == "security"]


Build = Callable[..., House]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Makes houses: build('[web] lines')."""
    made: list[House] = []

    def house(web: str = "", *, viewer: bool = True) -> House:
        for name, token in (("op", OPERATOR), ("view", VIEWER)):
            (tmp_path / name).write_text(token + "\n")
            (tmp_path / name).chmod(0o600)
        second = f'viewer_token_file = "{tmp_path}/view"\n' if viewer else ""
        now = [1_000_000.0]
        app = create(parse(f'[node]\ndata_dir = "{tmp_path}/data"\n[web]\ntoken_file = "{tmp_path}/op"\n'
                           f'{second}{web}\n'), clock=lambda: now[0])
        routes = APIRouter()

        @routes.get("/look")
        def look(user: Viewer) -> dict[str, str]:
            return {"name": user.name}

        @routes.post("/act")
        def act(user: Operator) -> dict[str, str]:
            return {"name": user.name}

        @routes.get("/fail")
        def fail() -> None:
            raise RuntimeError("inner words")

        app.include_router(routes)
        made.append(House(app, now))
        return made[-1]

    with capture_logs():  # the traceback of /fail, drawn for people, takes seconds
        yield house
    for one in made:
        one.app.state.site.ledger.close()


@pytest.fixture
def house(build: Build) -> House:
    return build()


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


# --- behind a reverse proxy


PROXY = 'user_header = "X-Remote-User"\ntrusted_proxies = ["192.0.2.0/28", "2001:db8::1"]\noperators = ["anna"]'


def test_a_trusted_proxy_names_its_users(build: Build) -> None:
    """Those of web.operators may act, with the secret of their page; the others look. The history has their names."""
    house = build(PROXY)
    anna = house.client(address="192.0.2.3", X_Remote_User="anna")
    assert anna.post("/act").status_code == 403
    assert anna.post("/act", headers={"X-CSRF-Token": house.csrf(anna)}).json() == {"name": "anna"}
    bert = house.client(address="2001:db8::1", X_Remote_User="bert")
    assert bert.get("/look").json() == {"name": "bert"}
    assert bert.post("/act", headers={"X-CSRF-Token": house.csrf(anna)}).status_code == 403
    assert bert.post("/act", headers={"X-CSRF-Token": house.csrf(bert)}).status_code == 403


@pytest.mark.parametrize("address", ["192.0.2.16", "127.0.0.1", "2001:db8::2", "::ffff:203.0.113.1", "testclient"])
def test_nobody_else_may_name_a_user(build: Build, address: str) -> None:
    """Whatever they forward: the header counts by who connects. It is written down."""
    house = build(PROXY)
    client = house.client(address=address, X_Remote_User="anna", X_Forwarded_For="192.0.2.3")
    assert client.get("/look").status_code == 303
    assert client.post("/act").status_code == 401
    assert set(house.recorded()) == {("user-header", address.removeprefix("::ffff:"))}


def test_a_header_that_the_proxy_only_added_to_is_not_believed(build: Build) -> None:
    """Two names: one of them is what the browser sent. A name that differs in an underscore is another header."""
    client = build(PROXY).client(address="192.0.2.3")
    for headers in ([("X-Remote-User", "anna"), ("X-Remote-User", "bert")], [("X_Remote_User", "anna")]):
        assert client.get("/look", headers=headers).status_code == 303


@pytest.mark.parametrize(("sent", "name"), [("jürgen".encode(), "jürgen"), (b"j\xfcrgen", "jürgen"),
                                            ("an\u202ena\u0007".encode(), "an?na?"), (b"x" * 5000, "x" * 64)])
def test_names_of_users_are_read_as_they_were_written_and_are_safe_to_show(build: Build, sent: bytes,
                                                                           name: str) -> None:
    """UTF-8 as proxies send it, latin-1 as RFC 9110 has it; no control characters, not without end."""
    house = build(PROXY.replace("anna", "jürgen"))
    client, who = house.client(address="192.0.2.3"), {b"X-Remote-User": sent}
    assert client.get("/look", headers=who).json() == {"name": name}
    csrf = re.findall(r'"X-CSRF-Token": "([^"]+)"', client.get("/", headers=who).text)[0].encode()
    answer = client.post("/act", headers=who | {b"X-CSRF-Token": csrf})
    assert answer.status_code == (200 if name == "jürgen" else 403)


def test_a_name_that_only_looks_like_an_operators_may_not_act(build: Build) -> None:
    """Whether somebody may act is asked of the name as it came, not as it is shown."""
    house = build(PROXY.replace('"anna"', f'"an?na", "{"x" * 64}"'))
    for sent in ("an\u202ena".encode(), b"x" * 65):
        client, who = house.client(address="192.0.2.3"), {b"X-Remote-User": sent}
        csrf = re.findall(r'"X-CSRF-Token": "([^"]+)"', client.get("/", headers=who).text)[0].encode()
        answer = client.post("/act", headers=who | {b"X-CSRF-Token": csrf})
        assert answer.status_code == 403 and "look, not act" in answer.text


def test_without_configuration_no_header_is_believed(house: House) -> None:
    """Nor any that proxies usually send."""
    names = ("X-Remote-User", "Remote-User", "X-Forwarded-User", "X-User")
    assert house.client().get("/look", headers=dict.fromkeys(names, "anna")).status_code == 303


def test_guesses_behind_a_proxy_count_for_who_made_them(build: Build) -> None:
    """Not for the proxy, through which everybody comes; what the guesser adds to the header does not help."""
    house = build(PROXY)
    for n in range(ATTEMPTS):
        house.client(address="192.0.2.3", Authorization="Bearer wrong",
                     X_Forwarded_For=f"10.0.0.{n}, 203.0.113.9").get("/look")
    assert house.recorded() == [("wrong-token", "203.0.113.9")] * ATTEMPTS
    other = house.client(address="192.0.2.3", Authorization=f"Bearer {OPERATOR}", X_Forwarded_For="203.0.113.10")
    assert other.get("/look").status_code == 200


def test_a_guesser_is_known_again_however_the_proxy_writes_the_address(build: Build) -> None:
    """With a port, as some do, or as IPv6; the proxy too is known under both forms of its address."""
    house = build(PROXY)
    for n in range(ATTEMPTS):
        forms = (f"203.0.113.9:{5000 + n}", "::ffff:203.0.113.9", "203.0.113.9", f"[::ffff:203.0.113.9]:{n}")
        house.client(address="::ffff:192.0.2.3", Authorization="Bearer wrong",
                     X_Forwarded_For=forms[n % 4]).get("/look")
    assert house.recorded() == [("wrong-token", "203.0.113.9")] * ATTEMPTS


def test_what_a_request_writes_into_the_history_is_short_and_plain(house: House) -> None:
    """It is kept for ever, and people read it."""
    client = house.client(Authorization=f"Bearer {VIEWER}")
    assert client.post(f"/studies/%E2%80%AE{'x' * 3000}/act/retry").status_code == 403
    reason = house.app.state.site.ledger.events()[-1]["reason"]
    assert len(reason) <= 300 and reason.isprintable()


def test_under_a_prefix_every_address_carries_it(build: Build) -> None:
    """Whether the proxy takes it off the path or leaves it on."""
    house = build('root_path = "/nbd"')
    client = house.client()
    for path in ("/nbd/look", "/look"):
        assert client.get(path).headers["Location"] == "/nbd/login?next=/look"
    answer = client.post("/nbd/login", data={"token": OPERATOR, "next": "/look"})
    assert answer.headers["Location"] == "/nbd/look" and "Path=/nbd;" in answer.headers["Set-Cookie"]
    assert client.get("/nbd/look").status_code == 200
    text = client.get("/nbd").text
    assert not re.findall(r'(?:href|src|action)="/(?!nbd/)[^"]*"', text) and 'aria-current="page"' in text
    assert client.get("/nbd/static/style.css").status_code == client.get("/static/style.css").status_code == 200
    assert client.get("/nbdx/look").status_code == 404


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
