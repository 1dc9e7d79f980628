"""The sections of the configuration file, one frozen model each; every key, its default and what it may be."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, field_validator, model_validator

__all__ = [
    "Alerts", "Completeness", "Delivery", "Derived", "Node", "Peer", "Reception", "Retention", "Route", "Schedule",
    "Section", "Services", "Tls", "Web", "Work",
]

# PS3.5 Table 6.2-1: AE is at most 16 characters of the default repertoire, no backslash or control characters.
AE_CHARACTERS = r"^[ -\[\]-~]+$"
AETitle = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=16, pattern=AE_CHARACTERS)]
NAME_CHARACTERS = r"^[\w. -]+$"
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NAME_CHARACTERS)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0)]
Days = Annotated[float, Field(ge=0)]
TIME_OF_DAY = r"^([01]\d|2[0-3]):[0-5]\d$"
TimeOfDay = Annotated[str, StringConstraints(pattern=TIME_OF_DAY)]
#: "20:00-06:00", "mon-fri 20:00-06:00", "sat,sun 00:00-24:00": dicomnode/windows.py
WINDOW = (r"^(?:DAY(?:-DAY)?(?:,DAY(?:-DAY)?)* )?".replace("DAY", "(?:mon|tue|wed|thu|fri|sat|sun)") +
          r"(?:[01]\d|2[0-3]):[0-5]\d-(?:(?:[01]\d|2[0-3]):[0-5]\d|24:00)$")
WindowText = Annotated[str, StringConstraints(strip_whitespace=True, pattern=WINDOW)]
DEVICE, ONE_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$", r"^(cpu|cuda:\d+)$"
FINGERPRINT = r"^[0-9a-fA-F]{64}$"
HOST = r"^[A-Za-z0-9.:\[\]-]+$"
#: What a text of that pattern is called in messages.
SHAPES = {AE_CHARACTERS: "an AE title: printable ASCII without backslash",
          NAME_CHARACTERS: "a name: letters, digits, blank, dot, _ and -",
          DEVICE: "auto, cpu, cuda or one GPU such as cuda:0",
          ONE_DEVICE: "cpu or one GPU such as cuda:0",
          HOST: "a host name or address",
          FINGERPRINT: "a SHA-256 fingerprint: 64 hexadecimal digits, no colons",
          TIME_OF_DAY: 'a time of day such as "06:30"',
          WINDOW: 'a window such as "20:00-06:00" or "mon-fri 20:00-06:00"'}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Node(Section):
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


class Reception(Section):
    """The Storage SCP: who may associate, how much at once, how large."""

    max_associations: Annotated[int, Field(ge=1, le=1000)] = 60
    max_associations_per_peer: Annotated[int, Field(ge=1, le=1000)] = 50
    max_pdu: Annotated[int, Field(ge=4096, le=1048576)] = 131072
    acse_timeout_s: Annotated[float, Field(gt=0)] = 30
    dimse_timeout_s: Annotated[float, Field(gt=0)] = 60
    network_timeout_s: Annotated[float, Field(gt=0)] = 120
    max_object_mb: Annotated[int, Field(ge=1)] = 2048
    low_disk_mb: Annotated[int, Field(ge=0)] = 2048
    require_called_ae_title: bool = True
    max_association_s: Annotated[float, Field(gt=0)] = 14400
    max_decompressed_mb: Annotated[int, Field(ge=1)] = 8192


class Services(Section):
    """What the node answers besides C-STORE and C-ECHO: storage commitment, query and retrieve on its own spool."""

    storage_commitment: bool = True
    query_retrieve: bool = True
    max_matches: Annotated[int, Field(ge=1)] = 1000


class Tls(Section):
    """DICOM TLS (PS3.15 B.12, BCP 195): a port of its own for peers that come encrypted, a certificate for both ways.

    Keys and certificates are PEM files; a password is read from a file, never from the configuration.
    """

    port: Port | None = None
    certificate: Path | None = None
    key: Path | None = None
    key_password_file: Path | None = None
    ca: Path | None = None
    require_client_certificate: bool = True
    plain: bool = True

    @model_validator(mode="after")
    def _whole(self) -> Tls:
        if self.port is not None and (self.certificate is None or self.key is None):
            raise ValueError("port needs certificate and key")
        if self.port is not None and self.require_client_certificate and self.ca is None:
            raise ValueError("require_client_certificate needs ca, the authorities whose certificates are accepted")
        if not self.plain and self.port is None:
            raise ValueError("plain = false leaves no port to listen on: set port")
        return self


class Completeness(Section):
    """When a series counts as whole, and how long it is waited for."""

    quiet_s: Seconds = 30
    give_up_h: Annotated[float, Field(gt=0)] = 24
    ct_wait_s: Seconds = 600
    late_input: Literal["hold", "supersede", "ignore"] = "hold"


class Schedule(Section):
    """When jobs may start, and what is done by the clock. All times of day are in `timezone`."""

    timezone: str = "UTC"
    windows: tuple[WindowText, ...] = ()
    retrieve_at: TimeOfDay | None = None
    retrieve_days: Annotated[int, Field(ge=1, le=31)] = 1
    report_at: TimeOfDay | None = None

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"no time zone {value!r}; a name of the IANA list, e.g. \"Europe/Berlin\"") from error
        return value


class Retention(Section):
    """How long objects are kept. Nothing is removed before its results are confirmed; 0 keeps for ever."""

    inputs_days: Days = 0
    derived_days: Days = 0
    ignored_days: Days = 0
    free_mb: Annotated[int, Field(ge=0)] = 0


class Web(Section):
    """The status page and its REST API: a process of its own, on loopback unless told otherwise.

    Who holds the token of `token_file` may look and act, of `viewer_token_file` only look. Behind a reverse proxy that
    knows its users, `user_header` names them, believed from `trusted_proxies` alone.
    """

    enabled: bool = False
    host: str = "127.0.0.1"
    port: Port = 8811
    hosts: tuple[Annotated[str, StringConstraints(pattern=HOST)], ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    viewer_token_file: Path | None = None
    session_h: Annotated[float, Field(gt=0)] = 12
    user_header: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]*$")] = ""
    trusted_proxies: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    root_path: Annotated[str, StringConstraints(pattern=r"^(/[\w.~-]+)*$")] = ""
    show_names: bool = False

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text, strict=False)
        return value

    @model_validator(mode="after")
    def _whole(self) -> Web:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if bool(self.user_header) != bool(self.trusted_proxies):
            raise ValueError("user_header and trusted_proxies belong together: whose header is believed")
        if not _is_loopback(self.host) and self.certificate is None and not self.trusted_proxies:
            raise ValueError(f"host {self.host!r} can be reached from other machines: it needs certificate and key, or "
                             "a reverse proxy (trusted_proxies) that encrypts")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Alerts(Section):
    """Who is told when something needs a person. `urls_file` holds one apprise URL a line: secrets stay out of here."""

    urls_file: Path | None = None
    repeat_h: Annotated[float, Field(gt=0)] = 24
    digest: bool = True
    digest_at: TimeOfDay = "07:00"


class Work(Section):
    """How jobs run."""

    device: Annotated[str, StringConstraints(pattern=DEVICE)] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    attempts: Annotated[int, Field(ge=1)] = 3
    retry_s: Seconds = 60
    lease_s: Annotated[float, Field(ge=5)] = 60
    hang_s: Annotated[float, Field(ge=10)] = 1800
    heartbeat_s: Annotated[float, Field(ge=1)] = 10
    devices: tuple[Annotated[str, StringConstraints(pattern=ONE_DEVICE)], ...] = ()
    executor: Literal["local", "dask"] = "local"
    dask_scheduler: str = ""
    dask_jobs: Annotated[int, Field(ge=1)] = 1


class Delivery(Section):
    """How derived series are sent."""

    retry_s: Annotated[float, Field(gt=0)] = 30
    retry_max_s: Annotated[float, Field(gt=0)] = 3600
    give_up_h: Annotated[float, Field(gt=0)] = 72
    connect_timeout_s: Annotated[float, Field(gt=0)] = 10
    dimse_timeout_s: Annotated[float, Field(gt=0)] = 60
    commitment_timeout_s: Annotated[float, Field(gt=0)] = 3600
    commitment_attempts: Annotated[int, Field(ge=1)] = 3


class Derived(Section):
    """What the derived series carries."""

    series_description: str = "NBD deblurred"
    series_number_offset: Annotated[int, Field(ge=1)] = 1000
    research_use: bool = True


class Peer(Section):
    """Who may send to us (AE title and address) and to whom we send (host and port)."""

    name: Name
    ae_title: AETitle
    host: str
    port: Port | None = None
    addresses: tuple[str, ...] = ()
    may_send: bool = True
    may_query: bool = False
    query: bool = False
    retrieve: Literal["c-move", "c-get"] = "c-move"
    confirm: Literal["store", "find", "commitment"] = "store"
    tls: bool = False
    tls_ca: Path | None = None
    certificate_sha256: tuple[Annotated[str, StringConstraints(pattern=FINGERPRINT)], ...] = ()
    stow_url: str | None = None
    stow_token_file: Path | None = None
    _node_tls: Tls = PrivateAttr(default_factory=Tls)

    @property
    def node_tls(self) -> Tls:
        """Our own certificate and authorities, for associations with this peer; Config puts them here."""
        return self._node_tls

    @model_validator(mode="after")
    def _tls_means_only(self) -> Peer:
        if self.certificate_sha256 and not self.tls:
            raise ValueError("certificate_sha256 needs tls = true: it could come without any certificate otherwise")
        return self

    @model_validator(mode="after")
    def _web(self) -> Peer:
        if self.stow_url is not None and not re.match(r"https?://[^/\s]+(/[^?#\s]*)?$", self.stow_url):
            raise ValueError("stow_url must be the http or https address of DICOMweb services")
        if self.stow_token_file is not None and self.stow_url is None:
            raise ValueError("stow_token_file needs stow_url")
        return self

    @field_validator("stow_url")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value is not None and "@" in urlsplit(value).netloc:
            raise ValueError("must not hold a name and password: put a token into stow_token_file")
        return value

    @field_validator("addresses")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text, strict=False)
        return value


class Route(Section):
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
    windows: tuple[WindowText, ...] | None = None
    urgent: bool = False
    late_input: Literal["hold", "supersede", "ignore"] | None = None
    source: str | None = None
    also: tuple[Literal["report", "kernel", "pictures"], ...] = ()

    @field_validator("also")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names one twice")
        return value

    @field_validator("send_to")
    @classmethod
    def _somewhere(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one peer")
        if len(set(value)) != len(value):
            raise ValueError("names a peer twice")
        return value
