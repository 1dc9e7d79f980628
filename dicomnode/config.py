"""Configuration: one frozen, validated value read once from TOML and passed down. An unknown key is an error."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from dicomnode.errors import ConfigError
from dicomnode.sections import (
    SHAPES,
    Alerts,
    Completeness,
    Delivery,
    Derived,
    Node,
    Peer,
    Reception,
    Retention,
    Route,
    Schedule,
    Section,
    Services,
    Tls,
    Web,
    Work,
)

__all__ = [
    "Alerts", "Completeness", "Config", "Delivery", "Derived", "Node", "Peer", "Reception", "Retention", "Route",
    "Schedule", "Services", "Tls", "Web", "Work", "load", "parse",
]

class Config(Section):
    """The whole configuration."""

    node: Node = Node()
    reception: Reception = Reception()
    services: Services = Services()
    tls: Tls = Tls()
    completeness: Completeness = Completeness()
    schedule: Schedule = Schedule()
    work: Work = Work()
    delivery: Delivery = Delivery()
    derived: Derived = Derived()
    retention: Retention = Retention()
    alerts: Alerts = Alerts()
    web: Web = Web()
    peer: tuple[Peer, ...] = ()
    route: tuple[Route, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for kind, names in (("peer", [p.name for p in self.peer]), ("route", [r.name for r in self.route])):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"two [[{kind}]] tables are named {sorted(twice)[0]!r}")
        peers = {p.name: p for p in self.peer}
        for route in self.route:
            for name in route.send_to:
                if name not in peers:
                    raise ValueError(f"route {route.name!r} sends to {name!r}, and no [[peer]] has that name")
                if peers[name].port is None and peers[name].stow_url is None:
                    raise ValueError(f"route {route.name!r} sends to {name!r}, and that [[peer]] has no port")
            if route.source is not None and not (route.source in peers and peers[route.source].query):
                raise ValueError(f"route {route.name!r} has source {route.source!r}; no [[peer]] with query = true "
                                 "has that name")
        if self.tls.plain and self.tls.port == self.node.port:
            raise ValueError("tls.port is node.port: TLS needs a port of its own, or tls.plain = false")
        for peer in self.peer:
            peer._node_tls = self.tls
            if peer.tls and not (self.tls.ca or peer.tls_ca or peer.certificate_sha256):
                raise ValueError(f"peer {peer.name!r} has tls = true: set tls.ca, its tls_ca or certificate_sha256")
            by_web = peer.confirm == "find" and peer.stow_url is not None
            if (peer.query or (peer.confirm != "store" and not by_web)) and peer.port is None:
                raise ValueError(f"peer {peer.name!r} is to be asked (query, confirm) and has no port")
        if self.schedule.retrieve_at is not None and not any(peer.query for peer in self.peer):
            raise ValueError("schedule.retrieve_at needs a [[peer]] with query = true")
        if self.web.enabled and self.web.port in (self.node.port, self.tls.port):
            raise ValueError("web.port is a DICOM port of the node: the status page needs a port of its own")
        if self.work.executor == "dask" and not self.work.dask_scheduler:
            raise ValueError("work.executor = \"dask\" needs work.dask_scheduler, e.g. \"tcp://scheduler:8786\"")
        return self

    def named_peer(self, name: str) -> Peer:
        """Raises ConfigError where no peer has that name."""
        for peer in self.peer:
            if peer.name == name:
                return peer
        raise ConfigError(f"no [[peer]] is named {name!r}. Remedy: add it to the configuration.")

    def named_route(self, name: str) -> Route | None:
        return next((route for route in self.route if route.name == name), None)


def parse(text: str, *, origin: str = "configuration") -> Config:
    """A Config from TOML text. Raises ConfigError naming `origin`, each wrong key and the reason.

    >>> parse('[node]\\nae_title = "NBD"').node.ae_title
    'NBD'
    >>> parse("[node]\\ncolour = 1")
    Traceback (most recent call last):
    dicomnode.errors.ConfigError: configuration is not usable:
      node.colour: unknown key
    """
    try:
        return _checked(Config.model_validate(tomllib.loads(text)), origin)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from error
    except ValidationError as error:
        lines = [f"  {_key(item['loc'])}: {_sentence(item)}" for item in error.errors()]
        raise ConfigError(f"{origin} is not usable:\n" + "\n".join(lines)) from error


def load(path: Path) -> Config:
    """A Config from a TOML file. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}. Remedy: copy conf/dicomnode.toml there, or name "
                          "another with --config.") from error
    except PermissionError as error:
        raise ConfigError(f"no permission to read the configuration {path}. Remedy: run it as the user of the node "
                          "(sudo -u dicomnode).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    return parse(text, origin=str(path))


def _checked(config: Config, origin: str) -> Config:
    """What needs the parts that a route names: methods, presets, settings, DICOM keywords."""
    from deconv import PRESET_NAMES  # not the methods themselves: the receiving process never loads torch
    from dicomnode.routing import validate_when

    problems = []
    for route in config.route:
        problems += [f"  route {route.name!r}, when: {problem}" for problem in validate_when(route.when)]
        presets = PRESET_NAMES.get(route.method)
        if presets is None:
            problems.append(f"  route {route.name!r}: no method {route.method!r}; there are {', '.join(PRESET_NAMES)}")
        elif route.preset not in presets:
            problems.append(f"  route {route.name!r}: method {route.method!r} has no preset {route.preset!r}; "
                            f"it has {', '.join(presets)}")
    if problems:
        raise ConfigError(f"{origin} is not usable:\n" + "\n".join(problems))
    return config


def _key(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".") or "whole file"


def _sentence(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key"
    if item["type"] == "string_pattern_mismatch" and item["ctx"]["pattern"] in SHAPES:
        return f"{item['input']!r} is not {SHAPES[item['ctx']['pattern']]}"
    return str(item["msg"]).removeprefix("Value error, ")
