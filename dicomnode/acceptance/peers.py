"""What the peers say: C-ECHO; and for the acceptance test C-STORE of a phantom, its confirmation, C-FIND."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dicomnode.acceptance import phantom
from dicomnode.acceptance.finding import Finding
from dicomnode.config import Config, Peer
from dicomnode.errors import Exit, NodeError

__all__ = ["accepted", "echo", "reachable"]

DUPLICATE = 0x0111  # PS3.7 C.5.7: the phantom of an earlier test is there already
LOOKS, LOOK_S = 4, 1.0  # a peer may need a moment until what it stored can be found
ASK_IT = "look into the log of the peer"


def echo(peer: Peer, config: Config) -> None:
    """C-ECHO. Raises PeerUnreachable, and ConfigError where our own certificate cannot be used."""
    from dicomnode import scu

    scu.echo(peer, calling_ae=config.node.ae_title, connect_timeout_s=config.delivery.connect_timeout_s,
             dimse_timeout_s=config.delivery.dimse_timeout_s)


def reachable(config: Config) -> Iterator[Finding]:
    """Every peer that we may have to reach, asked whether it is there. Sends no object."""
    for peer in config.peer:
        what = f"peer {peer.name}"
        if peer.stow_url is not None:
            yield _tried(what, partial(_stow_answers, peer, config))
        if peer.port is not None:
            yield _tried(what, partial(_echoes, peer, config))
        elif peer.stow_url is None:
            yield Finding(what, "ok", f"{peer.ae_title} only sends to us (no port)")


def accepted(config: Config) -> Iterator[Finding]:
    """The phantom at every destination of a route, confirmed as configured; every source queried."""
    destinations = {name for route in config.route for name in route.send_to}
    with tempfile.TemporaryDirectory(prefix="dicomnode-check-") as folder:
        made = phantom.write(Path(folder), config)
        for peer in config.peer:
            if peer.name in destinations:
                stored = _tried(f"store at {peer.name}", partial(_store, peer, config, made))
                yield stored
                if stored.verdict == "ok" and peer.confirm != "store":
                    yield _tried(f"confirmation of {peer.name}", partial(_confirmed, peer, config, made))
            if peer.query:
                yield _tried(f"query of {peer.name}", partial(_queried, peer, config, made))


def _tried(what: str, test: Callable[[], Finding | str]) -> Finding:
    """Whatever the node says that it cannot do is a finding; a sentence means that all is well."""
    try:
        found = test()
    except NodeError as error:
        return Finding(what, "problem", str(error), exit_code=Exit.UNREACHABLE)
    return Finding(what, "ok", found) if isinstance(found, str) else _renamed(found, what)


def _renamed(found: Finding, what: str) -> Finding:
    return Finding(what, found.verdict, found.text, found.remedy, Exit.UNREACHABLE)


def _echoes(peer: Peer, config: Config) -> str:
    started = time.perf_counter()
    echo(peer, config)
    return (f"{peer.ae_title} at {peer.host}:{peer.port} answers C-ECHO{' over TLS' if peer.tls else ''} in "
            f"{(time.perf_counter() - started) * 1000:.0f} ms")


def _stow_answers(peer: Peer, config: Config) -> str:
    from dicomnode import stow

    return stow.check(peer, tls=config.tls, connect_timeout_s=config.delivery.connect_timeout_s,
                      timeout_s=config.delivery.dimse_timeout_s)


def _store(peer: Peer, config: Config, made: phantom.Phantom) -> Finding | str:
    """C-STORE, or STOW-RS, of the phantom, by the way that results go."""
    delivery = config.delivery
    if peer.stow_url is not None:
        from dicomnode import stow

        answer = stow.send(peer, [made.path], tls=config.tls, on_answer=lambda _: None,
                           connect_timeout_s=delivery.connect_timeout_s, timeout_s=delivery.dimse_timeout_s)[0]
    else:
        from dicomnode import scu

        answer = scu.send(peer, [made.path], calling_ae=config.node.ae_title, on_answer=lambda _: None,
                          connect_timeout_s=delivery.connect_timeout_s, dimse_timeout_s=delivery.dimse_timeout_s)[0]
    comment = f" ({answer.comment})" if answer.comment else ""
    if answer.status == DUPLICATE:
        return f"has the phantom of an earlier test{comment}"
    if not answer.stored:
        return Finding("", "problem", f"answers the phantom (PET Image) with status 0x{answer.status:04X}{comment}",
                       "let it accept PET Image Storage from our AE title")
    if answer.status:
        return Finding("", "warning", f"stores the phantom with warning 0x{answer.status:04X}{comment}", ASK_IT)
    return f"stores a PET instance of patient {phantom.PATIENT_NAME}, study {made.study_uid}"


def _confirmed(peer: Peer, config: Config, made: phantom.Phantom) -> Finding | str:
    if peer.confirm == "commitment":
        from dicomnode.acceptance import committing

        return committing.test(peer, config, made)
    for look in range(LOOKS):
        if look:
            time.sleep(LOOK_S)
        if made.sop_instance_uid in _held(peer, config, made):
            return "finds the phantom that it stored"
    return Finding("", "problem", f"does not find the phantom that it stored, {LOOKS * LOOK_S:.0f} s later",
                   "let it list what our AE title stored, or set peer.confirm = \"store\"")


def _held(peer: Peer, config: Config, made: phantom.Phantom) -> list[str]:
    if peer.stow_url is not None:
        from dicomnode import stow

        return stow.instances(peer, made.study_uid, made.series_uid, tls=config.tls,
                              connect_timeout_s=config.delivery.connect_timeout_s,
                              timeout_s=config.delivery.dimse_timeout_s)
    from dicomnode.query import Asking, Times

    with Asking(peer, Times.of(config)) as asking:
        return asking.instances(made.study_uid, made.series_uid)


def _queried(peer: Peer, config: Config, made: phantom.Phantom) -> str:
    """One study asked for by its UID: answered by any peer that answers C-FIND at all, with one match or none."""
    from dicomnode.query import Asking, Times

    with Asking(peer, Times.of(config)) as asking:
        found = asking.studies(study_uid=made.study_uid)
    return f"answers C-FIND, Study Root ({len(found)} match)"
