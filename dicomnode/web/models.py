"""What the REST API answers with: one model for each value, so that OpenAPI says all of it.

Times are ISO 8601 in UTC, to the second. UIDs and accession numbers name things; no answer holds a patient's name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Alert", "Alerts", "Delivery", "Done", "Event", "Events", "Forecast", "Health", "Job", "Night", "NightLine",
           "Nights", "Peer", "Peers", "Readiness", "Series", "Status", "Studies", "Study", "StudySummary"]

Time = Annotated[str, Field(examples=["2026-09-23T21:06:40Z"])]
Uid = Annotated[str, Field(examples=["2.25.329800735698586629295641978511506172918"])]
Counts = dict[str, int]


class Model(BaseModel):
    """Nothing that is not said here is answered."""

    model_config = ConfigDict(extra="forbid")


class Series(Model):
    """A received series and the newest job of it. `state`, `code` and `reason` are the job's where there is one."""

    study: Uid
    series: Uid
    modality: str = Field(examples=["PT"])
    accession_number: str
    series_number: str
    series_description: str
    instances: int
    calling_ae: str = Field(description="the AE title that sent it")
    received_at: Time | None
    last_received_at: Time | None
    state: str = Field(examples=["held"])
    code: str = Field(description="the reason as a stable word", examples=["gate"])
    reason: str
    series_state: str
    series_reason: str
    until: Time | None = Field(description="waiting: until then")
    job: int | None
    route: str | None
    method: str | None
    preset: str | None
    attempts: int | None
    progress: dict[str, Any] | None = Field(description="stage, step, steps and loss while it runs")
    guide_series: Uid | None
    derived_series: Uid | None
    derived_instances: int | None
    queued_at: Time | None
    started_at: Time | None
    built_at: Time | None
    finished_at: Time | None


class Remark(Model):
    """An answer of a peer other than success."""

    status: str = Field(description="C-STORE status", examples=["0xB000"])
    instances: int
    comment: str


class Delivery(Model):
    """How far a derived series is on its way to one peer."""

    peer: str
    state: Literal["waiting", "delivered", "committed", "dead"]
    reason: str
    attempts: int
    accepted: int
    answered: int
    remarks: list[Remark]
    confirm: str
    committed: int
    next_at: Time | None
    prove_at: Time | None
    done_at: Time | None


class Companion(Model):
    """A series made beside the derived one: report, kernel or pictures."""

    kind: str
    series: Uid
    series_number: int | None
    series_description: str
    modality: str
    instances: int


class Companions(Model):
    """What was made beside the derived series and is delivered with it, and what was not, with the reason."""

    instances: int
    series: list[Companion]
    left_out: dict[str, str]


class Job(Model):
    """One derived series to make. `study` and `series`: of the PET it is made of."""

    job: int
    study: Uid
    series: Uid
    state: str
    code: str
    reason: str
    route: str
    method: str
    preset: str
    settings: dict[str, Any]
    guide_series: Uid | None
    inputs: int
    attempts: int
    progress: dict[str, Any] | None
    derived_series: Uid | None
    derived_instances: int | None
    also: Companions
    queued_at: Time | None
    started_at: Time | None
    built_at: Time | None
    finished_at: Time | None
    deliveries: list[Delivery]


class Event(Model):
    """One line of history: what changed, why, and by whom."""

    at: Time | None
    kind: str = Field(examples=["job"])
    series: str
    job: int | None
    from_state: str
    to_state: str
    code: str
    reason: str
    actor: str = Field(description="node, an AE title, an address, or web:NAME of a person", examples=["web:operator"])


class StudySeries(Series):
    """A series of a study with all of its jobs."""

    judged: str = Field(description="why it was found complete, and which CT was chosen and why")
    conflicts: int = Field(description="objects that came with other bytes under a known UID")
    jobs: list[Job]


class Study(Model):
    """Everything about one study."""

    study: Uid
    accession_number: str
    series: list[StudySeries]
    events: list[Event]


class StudySummary(Model):
    """One study in a list. From `series` on of the series that stands for it: the PET to look at first."""

    study: Uid
    accession_number: str
    received_at: Time | None
    last_received_at: Time | None
    series_count: int
    pets: int = Field(description="PET series")
    instances: int
    calling_ae: str
    series: Uid
    modality: str
    description: str
    state: str
    code: str
    reason: str
    until: Time | None
    job: int | None
    route: str
    method: str
    preset: str
    progress: dict[str, Any] | None
    derived_series: str
    finished_at: Time | None


class Studies(Model):
    """Studies, newest first. `next`: give it as `before` for the next page; null: there is none."""

    studies: list[StudySummary]
    next: str | None


class Worker(Model):
    """Something that runs jobs: one device of one process."""

    name: str
    device: str
    job: int | None
    stale: bool = Field(description="not heard of for too long: it died or hangs")
    started_at: Time | None
    heartbeat_at: Time | None


class Rows(Model):
    """How many there are, by state."""

    series: Counts
    job: Counts
    delivery: Counts
    instance: Counts


class Status(Model):
    """The node at a glance."""

    ae_title: str
    version: str
    at: Time | None
    counts: Rows
    workers: list[Worker]
    running: list[Series]
    held: list[Series]
    last_received_at: Time | None
    free_bytes: int


class Forecast(Model):
    """What fits tonight: waiting jobs in the order of their start, and what the forecast rests on."""

    model_config = ConfigDict(extra="allow")
    at: Time | None
    timezone: str
    devices: list[str]
    counts: Counts = Field(description="jobs by verdict: fits, past-end, not-tonight, unknown")
    jobs: list[dict[str, Any]]
    measured: list[dict[str, Any]]


class Events(Model):
    """History, newest first. `next`: give it as `before` for what was earlier; null: there is nothing."""

    events: list[Event]
    next: int | None


class Alert(Model):
    """One thing that is wrong now. The same thing keeps its key."""

    key: str = Field(examples=["disk"])
    level: Literal["warning", "problem"]
    text: str
    first_at: Time | None = Field(description="since when it is known; null: it was found just now")
    sent_at: Time | None = Field(description="when somebody was told; null: nobody was")


class Alerts(Model):
    """All that is wrong now; the worst kind first."""

    alerts: list[Alert]


class Peer(Model):
    """Who may send to us and to whom we send. Secrets are no part of it."""

    name: str
    ae_title: str
    host: str
    port: int | None
    may_send: bool
    may_query: bool
    query: bool
    confirm: str
    tls: bool
    stow_url: str | None
    routes: list[str] = Field(description="routes that send to it")
    deliveries: Counts = Field(description="deliveries to it by state")


class Peers(Model):
    """The peers of the configuration."""

    peers: list[Peer]


class StudyLine(Model):
    """How far one study got in a night."""

    study: str
    study_uid: Uid
    study_date: str
    eligible: int
    received: int
    processed: int
    delivered: int
    committed: int
    missing: list[str] = Field(description="what is not done, and why")


class SourceLine(Model):
    """One source and its studies."""

    source: str
    asked_at: Time | None
    problem: str
    studies: list[StudyLine]
    totals: Counts


class Night(Model):
    """The reconciliation of one day: what the sources hold for us, and how far it got."""

    day: str = Field(examples=["2026-09-23"])
    since: str
    made_at: str
    complete: bool
    totals: Counts
    sources: list[SourceLine]


class NightLine(Model):
    """A night in the list. `problem`: why its report cannot be read; "" where it can."""

    day: str
    complete: bool | None
    totals: Counts
    problem: str


class Nights(Model):
    """The reports that are kept, newest first."""

    nights: list[NightLine]


class Done(Model):
    """What was changed."""

    series: Uid
    job: int | None
    state: str = Field(description="the new state", examples=["queued"])
    text: str = Field(examples=["the job is queued again"])


class Health(Model):
    """The process lives."""

    status: Literal["alive"]


class Readiness(Model):
    """Whether studies can come in and are worked on."""

    status: Literal["ready", "not ready"]
    reasons: list[str] | None = Field(description="what is wrong; null for whoever does not say who asks")
