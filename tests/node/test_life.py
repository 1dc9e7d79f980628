"""The life of a series in any order: objects, resends, purges, crashes, lost files, and what a person decides.

Matcher, executor, purger and reception are the real ones; the method and the peers are stand-ins. An image depends on
the inputs, on memory_gb and on the machine, as a real one's bits do.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dicomnode import operate, retention
from dicomnode.errors import NodeError
from dicomnode.executor import Executor
from dicomnode.runner import Ending
from tests.node.line import PET_ROUTE, Line, full_settings_here
from tests.node.test_matcher import longer
from tests.node.test_retention import resend

DAY = 86400.0
TOML = "[retention]\ninputs_days = 3\nderived_days = 5\nignored_days = 2\n[work]\nattempts = 2\nretry_s = 60\n"
ROUTE = PET_ROUTE.replace('["PACS"]', '["PACS", "SECOND"]') + 'guide = "never"\n' + (
    '[[peer]]\nname = "SECOND"\nae_title = "SECOND"\nhost = "127.0.0.1"\nport = 2\n')
OVER = ("cancelled", "superseded")


class Method:
    """A runner whose image depends on inputs, memory and machine; `says` is how its next runs end."""

    def __init__(self) -> None:
        self.machine, self.says = "a", "built"

    def start(self, job: Mapping[str, Any], order: Mapping[str, Any], folder: Path) -> Method:
        if self.says != "built":
            self.word: dict[str, Any] = {"kind": "failed", "reason": "no memory", "code": "memory"}
            return self
        missing = [name for name in order["pet_files"] if not Path(name).is_file()]
        assert not missing, f"a job runs and its input is gone: {missing}"
        recipe = f"{sorted(order['pet_files'])}{order['settings']}"
        uid = f"2.25.{int(hashlib.sha256(recipe.encode()).hexdigest()[:12], 16)}"
        (folder / "derived.tmp").mkdir()
        for number in range(2):
            (folder / "derived.tmp" / f"{uid}.{number}.dcm").write_text(f"{recipe}{self.machine}{number}")
        self.word = {"kind": "built", "report": {"derived_series_uid": uid, "derived_instances": 2}}
        return self

    ended = True

    def read(self, wait_s: float) -> list[dict[str, Any]]:
        return [self.word]

    def finish(self, *, grace_s: float) -> Ending:
        return Ending("")


class Life(RuleBasedStateMachine):
    """One PET series of up to 12 slices; two peers."""

    @initialize(policy=st.sampled_from(["supersede", "hold", "ignore"]), far=st.integers(0, 4))
    def start(self, policy: str, far: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.line = Line(self.folder, toml=TOML, route=ROUTE)
        complete = self.line.config.completeness.model_copy(update={"late_input": policy})
        self.line.config = self.line.config.model_copy(update={"completeness": complete})
        self.slices = longer(12)
        self.uid = str(self.slices[0].SeriesInstanceUID)
        self.came = 0
        self.method = Method()
        self.held_by: dict[tuple[str, str], str] = {}  # peer, SOP Instance UID -> what it got under that UID
        self.matcher = self.line.matcher()
        self.arrive(8)
        for step in ((lambda: self.judge(31.0)), (lambda: self.work("built", "a")), (lambda: self.send("PACS", "all")),
                     (lambda: self.send("SECOND", "all")))[:far]:
            step()

    def teardown(self) -> None:
        if hasattr(self, "line"):
            self.line.ledger.close()
            shutil.rmtree(self.folder)

    # --- what happens

    @rule(count=st.integers(1, 2))
    @precondition(lambda self: self.came < 12)
    def arrive(self, count: int) -> None:
        new = self.slices[self.came:self.came + count]
        self.came += len(new)
        assert resend(self.line, new) == ["new"] * len(new)

    @rule(first=st.integers(0, 11), count=st.integers(1, 12))
    def come_again(self, first: int, count: int) -> None:
        again = self.slices[:self.came][first:first + count]
        assert resend(self.line, again) == ["repeat"] * len(again)

    @rule(wait_s=st.sampled_from([31.0, 300.0]))
    def judge(self, wait_s: float) -> None:
        self.line.now += wait_s
        self.matcher.tick()

    @rule(says=st.sampled_from(["built", "built", "built", "failed"]), machine=st.sampled_from("aab"))
    def work(self, says: str, machine: str) -> None:
        self.method.says, self.method.machine = says, machine
        executor = Executor(self.line.config, self.line.ledger, self.line.spool, clock=self.line.clock,
                            runner=self.method, full_settings=full_settings_here)  # type: ignore[arg-type]
        executor.recover()
        job = self.line.ledger.claim(executor.name, now=self.line.now, lease_s=60)
        if job is not None:
            executor.run_job(job, threading.Event())

    @rule(peer=st.sampled_from(["PACS", "SECOND"]), ends=st.sampled_from(["all", "all", "part", "dead"]))
    def send(self, peer: str, ends: str) -> None:
        """What the deliverer does with what is due to a peer."""
        ledger, now = self.line.ledger, self.line.now
        for row in ledger.due_deliveries(now=now):
            job = ledger.job(row["job_id"])
            if row["peer"] != peer:
                continue
            if job["state"] == "built":
                ledger.set_job(job["id"], "sending", now=now)
            files = sorted(self.line.spool.absolute(job["derived_path"]).glob("*.dcm"))
            if len(files) != job["derived_instances"]:
                ledger.set_job(job["id"], "held", now=now, code="derived-lost", reason="lost", derived_path=None)
                continue
            for file in files[:1 if ends == "part" else 0 if ends == "dead" else 2]:
                before = self.held_by.setdefault((peer, file.stem), file.read_text())
                assert before == file.read_text(), "one UID, two images"
                ledger.put_statuses(row["id"], [(file.stem, 0, "")], now=now)
            if ends != "part":
                ledger.set_delivery(row["id"], "delivered" if ends == "all" else "dead", now=now, reason=ends)

    @rule()
    def lose_derived_files(self) -> None:
        for folder in (self.line.spool.data_dir / "derived").iterdir():
            shutil.rmtree(folder)

    @rule(days=st.sampled_from([0.0, 0.1, 4.0, 6.0]), full=st.booleans(), crash=st.booleans())
    def purge(self, days: float, full: bool, crash: bool) -> None:
        self.line.now += days * DAY
        with self.line.ledger.transaction() as db:
            db.execute("DELETE FROM memo WHERE key = ?", (retention.CLOCK,))
        purger = retention.Purger(self.line.config, self.line.ledger, self.line.spool, clock=self.line.clock,
                                  free_bytes=lambda: 0 if full else 10**12)
        if not crash:
            purger.tick()
            return
        unlink, left = Path.unlink, [3]

        def falling(path: Path, missing_ok: bool = False) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            unlink(path, missing_ok=missing_ok)

        Path.unlink = falling  # type: ignore[method-assign]
        try:
            purger.tick()
        except KeyboardInterrupt:
            pass
        finally:
            Path.unlink = unlink  # type: ignore[method-assign]

    @rule(what=st.sampled_from([operate.retry, operate.retry, operate.release, operate.cancel, operate.hold,
                                operate.urgent]))
    def person(self, what: Any) -> None:
        before = [job for job in self.jobs() if job["state"] == "held" and job["code"] == "other-image"]
        try:
            what(self.line.ledger, self.uid, now=self.line.now, actor="mia")
        except NodeError:
            return
        if what is operate.release and before:  # the reason asks for the old one to be removed from the peers first
            self.held_by = {key: text for key, text in self.held_by.items()
                            if not key[1].startswith(before[-1]["derived_series_uid"])}

    # --- what always holds

    def jobs(self) -> list[dict[str, Any]]:
        return self.line.ledger.jobs_of_series(self.uid)

    def removed(self) -> bool:
        return any(event["code"] == "purged" and event["kind"] == "series" for event in self.line.ledger.events())

    @invariant()
    def rows_never_go_and_files_only_by_a_purge(self) -> None:
        rows = self.line.ledger.instances(self.uid)
        assert len(rows) == self.came == self.line.ledger.series(self.uid)["instances"]
        gone = retention.missing_files(rows, self.line.spool.data_dir)
        assert not gone or self.removed()

    @invariant()
    def what_a_job_needs_is_there(self) -> None:
        gone = set(retention.missing_files(self.line.ledger.instances(self.uid), self.line.spool.data_dir))
        for job in self.jobs():
            if job["state"] in ("queued", "running", "failed"):
                assert not gone & set(job["inputs"]), f"job {job['id']} waits, its input is gone"

    @invariant()
    def one_job_speaks_for_the_series(self) -> None:
        """And none waits for nobody."""
        alive = [job for job in self.jobs() if job["state"] not in OVER]
        assert len(alive) <= 1
        for job in alive:
            deliveries = self.line.ledger.deliveries(job["id"])
            if job["state"] in ("built", "sending"):
                assert any(row["state"] == "waiting" for row in deliveries), "it would stay so for ever"
            assert job["state"] != "held" or job["reason"]
        series = self.line.ledger.series(self.uid)
        assert series["state"] != "matched" or self.jobs()
        assert series["state"] != "held" or series["reason"]

    @invariant()
    def delivered_is_the_series_that_the_job_names(self) -> None:
        for job in self.jobs():
            for row in self.line.ledger.deliveries(job["id"]):
                if row["state"] == "delivered" and job["code"] != "other-image":
                    sent = set(self.line.ledger.statuses(row["id"]))
                    assert sent == {f"{job['derived_series_uid']}.{number}" for number in range(2)}
        for job in self.jobs():
            states = {row["state"] for row in self.line.ledger.deliveries(job["id"])}
            assert job["state"] != "delivered" or states == {"delivered"}


Life.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
