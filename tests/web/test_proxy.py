"""Behind a reverse proxy: who is believed what, and for whom guesses count."""

from __future__ import annotations

import re

import pytest

from dicomnode.web.refusals import ATTEMPTS
from tests.web.house import OPERATOR, VIEWER, Build, House

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
