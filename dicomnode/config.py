"""Configuration: one frozen, validated value read once from TOML and passed down. An unknown key is an error."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from dicomnode.errors import ConfigError

__all__ = [
    "Completeness", "Config", "Delivery", "Derived", "Node", "Peer", "Reception", "Route", "Work", "load", "parse",
]

# PS3.5 Table 6.2-1: AE is at most 16 characters of the default repertoire, no backslash or control characters.
AETitle = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=16, pattern=r"^[ -\[\]-~]+$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[\w. -]+$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Node(_Section):
    """Who we are and where we keep things."""

    ae_title: AETitle = "NBDNODE"
    host: str = "127.0.0.1"
    port: Port = 11112
    data_dir: Path = Path("/var/lib/dicomnode")
    uid_root: str = "2.25"
    institution: str = ""
    station_name: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    @field_validator("uid_root")
    @classmethod
    def _root(cls, value: str) -> str:
        if not re.fullmatch(r"[0-2](\.(0|[1-9]\d*))+", value) or len(value) > 24:
            raise ValueError("must be a UID root of digits and dots, at most 24 characters, e.g. 1.2.826.0.1.3680043")
        return value


class Reception(_Section):
    """The Storage SCP: who may associate, how much at once, how large."""

    max_associations: Annotated[int, Field(ge=1, le=1000)] = 60
    max_pdu: Annotated[int, Field(ge=4096, le=1048576)] = 131072
    acse_timeout_s: Annotated[float, Field(gt=0)] = 30
    dimse_timeout_s: Annotated[float, Field(gt=0)] = 60
    network_timeout_s: Annotated[float, Field(gt=0)] = 120
    max_object_mb: Annotated[int, Field(ge=1)] = 2048
    low_disk_mb: Annotated[int, Field(ge=0)] = 2048
    require_called_ae_title: bool = True


class Completeness(_Section):
    """When a series counts as whole, and how long it is waited for."""

    quiet_s: Seconds = 30
    give_up_h: Annotated[float, Field(gt=0)] = 24
    ct_wait_s: Seconds = 600


class Work(_Section):
    """How jobs run."""

    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    attempts: Annotated[int, Field(ge=1)] = 3
    retry_s: Seconds = 60
    lease_s: Annotated[float, Field(ge=5)] = 60
    hang_s: Annotated[float, Field(ge=10)] = 1800


class Delivery(_Section):
    """How derived series are sent."""

    retry_s: Annotated[float, Field(gt=0)] = 30
    retry_max_s: Annotated[float, Field(gt=0)] = 3600
    give_up_h: Annotated[float, Field(gt=0)] = 72
    connect_timeout_s: Annotated[float, Field(gt=0)] = 10
    dimse_timeout_s: Annotated[float, Field(gt=0)] = 60


class Derived(_Section):
    """What the derived series carries."""

    series_description: str = "NBD deblurred"
    series_number_offset: Annotated[int, Field(ge=1)] = 1000
    research_use: bool = True


class Peer(_Section):
    """Who may send to us (AE title and address) and to whom we send (host and port)."""

    name: Name
    ae_title: AETitle
    host: str
    port: Port | None = None
    addresses: tuple[str, ...] = ()
    may_send: bool = True

    @field_validator("addresses")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text, strict=False)
        return value


class Route(_Section):
    """Which series is processed how, and where the result goes. First match wins."""

    name: Name
    when: dict[str, str | list[str]]
    method: str = "nbd"
    preset: str = "best"
    settings: dict[str, Any] = {}
    psf: Literal["blind", "library", "measured"] = "library"
    send_to: tuple[str, ...]
    guide: Literal["prefer", "require", "never"] = "prefer"
    ct_wait_s: Seconds | None = None
    series_description: str | None = None
    priority: int = 0

    @field_validator("send_to")
    @classmethod
    def _somewhere(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one peer")
        if len(set(value)) != len(value):
            raise ValueError("names a peer twice")
        return value


class Config(_Section):
    """The whole configuration."""

    node: Node = Node()
    reception: Reception = Reception()
    completeness: Completeness = Completeness()
    work: Work = Work()
    delivery: Delivery = Delivery()
    derived: Derived = Derived()
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
                if peers[name].port is None:
                    raise ValueError(f"route {route.name!r} sends to {name!r}, and that [[peer]] has no port")
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
    """A Config from TOML text. Raises ConfigError naming `origin`, each wrong key and the reason."""
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
    return str(item["msg"]).removeprefix("Value error, ")
