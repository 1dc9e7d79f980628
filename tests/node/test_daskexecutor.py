"""Jobs on a Dask cluster as a site starts it: a scheduler and two workers by their commands, on loopback.

What was made with the cluster equals byte for byte what is made without; what happens to the cluster costs time only.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deconv import Cancelled, Progress, Volume, method
from deconv.phantoms import spheres
from dicomnode import daskclient, remote, troubles
from dicomnode.daskclient import ClusterUnavailable, WorkerLost
from dicomnode.daskexecutor import PROBE_S, WAITS, Cluster, DaskRunner, unreachable
from dicomnode.executor import Executor
from dicomnode.ledger import NewJob
from dicomnode.pipeline import process
from dicomnode.runner import ChildRunner
from dicomnode.troubles import Machine
from dicomnode.work import run as work
from tests.certificates import Authority
from tests.factories import pet_series
from tests.node.line import PET_ROUTE, Line
from tests.node.test_pipeline import blurred_pet
from tests.peers import REPOSITORY, wait_until

pytest.importorskip("distributed")

ROUTE = PET_ROUTE + 'guide = "never"\n'
TOML = "[work]\nattempts = 2\nretry_s = 60\nlease_s = 30\ndevice = \"cpu\"\nthreads = 1\n"
DASK = (sys.executable, "-m", "dask")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
LONG = {"iterations": 400}  # of TV: a second or two
ENDLESS = {"iterations": 100000}  # for jobs that are to be ended


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """A scheduler and its workers, processes started as docs/scale.md says. `dask`: a folder of Dask's settings."""

    def __init__(self, folder: Path, *, port: int = 0, protocol: str = "tcp", dask: Path | None = None) -> None:
        self.folder = folder
        self.environment = {**ENVIRONMENT, **({"DASK_CONFIG": str(dask)} if dask else {})}
        self.port = port or free_port()
        self.address = f"{protocol}://127.0.0.1:{self.port}"
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard",
                                    "--protocol", protocol)
        self.workers: list[subprocess.Popen] = []

    def start(self, *arguments: str) -> subprocess.Popen:
        with (self.folder / f"{arguments[0]}-{time.monotonic_ns()}.log").open("wb") as log:
            return subprocess.Popen([*DASK, *arguments], stdout=log, stderr=log, env=self.environment,
                                    cwd=self.folder)

    def worker(self, *arguments: str) -> subprocess.Popen:
        process = self.start("worker", self.address, "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny",
                             "--no-dashboard", "--local-directory", str(self.folder), *arguments)
        self.workers.append(process)
        return process

    def close(self) -> None:
        for one in [*self.workers, self.scheduler]:
            one.kill()
            one.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two workers that each offer the resource CPU once. A test that kills one starts another."""
    site = Site(tmp_path_factory.mktemp("cluster"))
    try:
        for _ in range(2):
            site.worker("--resources", "CPU=1")
        yield site
    finally:
        site.close()


def volume() -> Volume:
    values = np.random.default_rng(7).random((8, 16, 14), dtype=np.float32)
    return Volume.axial(values, (3.27, 4.69, 4.69))


def ask(site: Site, key: str, on_step: Callable[[Any], None] | None = None, **options: Any) -> remote.Computed:
    wanted: dict[str, Any] = {"method": "tv", "preset": "default", "overrides": {}, "device": "cpu", "threads": 1}
    return daskclient.deconvolve(site.address, volume(), None, key=key, on_step=on_step, **{**wanted, **options})


def queued(line: Line, method: str = "tv", preset: str = "default", settings: dict[str, Any] | None = None) -> int:
    """A queued job of a received series."""
    uid = line.receive(blurred_pet())
    row = line.ledger.series(uid)
    line.ledger.set_series(uid, "complete", now=line.now)
    inputs = tuple(one["sop_instance_uid"] for one in line.ledger.instances(uid))
    return line.ledger.add_job(NewJob("id", uid, row["study_uid"], None, "all-pet", method, preset, settings or {},
                                      ("PACS",), inputs), now=line.now)


def attempt(line: Line, executor: Executor, stop: threading.Event | None = None) -> dict[str, Any]:
    job = line.ledger.claim(executor.name, now=line.now, lease_s=line.config.work.lease_s)
    assert job is not None
    executor.run_job(job, stop or threading.Event())
    return line.ledger.job(job["id"])


def on_cluster(line: Line, site: Site) -> Executor:
    cluster = Cluster(line.ledger, site.address, clock=line.clock)
    return Executor(line.config, line.ledger, line.spool, clock=line.clock, device="dask",
                    runner=DaskRunner(cluster, "cpu", threads=1))


@contextmanager
def lines(tmp_path: Path, *names: str) -> Iterator[list[Line]]:
    made = [Line(tmp_path / name, toml=TOML, route=ROUTE) for name in names]
    try:
        yield made
    finally:
        for line in made:
            line.ledger.close()


def derived_here(line: Line, job: dict[str, Any], folder: Path) -> Path:
    """What this process makes of the job by the pipeline without a cluster."""
    order = Executor(line.config, line.ledger, line.spool, clock=line.clock)._order(job)
    before = torch.get_num_threads()
    try:
        process([Path(name) for name in order["pet_files"]], [], folder, method=order["method"],
                preset=order["preset"], overrides=order["settings"], device="cpu", threads=1,
                naming=order["derivation"], now=datetime.fromtimestamp(order["now"], UTC).astimezone())
    finally:
        torch.set_num_threads(before)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Objects and kernel; the report holds seconds."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".dcm", ".npy", ".npz")}


def computing(line: Line, job_id: int) -> bool:
    return (line.ledger.job(job_id)["progress"] or {}).get("stage") == "tv"


def busy(site: Site) -> list[subprocess.Popen]:
    """The workers that have a child now."""
    return [worker for worker in site.workers if worker.poll() is None and children(worker.pid)]


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, whichever of its threads started them."""
    return [int(number) for path in Path(f"/proc/{pid}/task").glob("*/children")
            for number in path.read_text().split()]


# --- the whole path


def test_a_killed_worker_costs_time_only_and_the_series_is_the_local_one_bit_for_bit(tmp_path: Path,
                                                                                    site: Site) -> None:
    """kill -9 in the middle: queued again, uncounted; the other worker builds what this node would have built."""
    with lines(tmp_path, "far", "near") as (far, near):
        job_id = queued(far, settings=LONG)
        killed: list[subprocess.Popen] = []

        def kill() -> None:
            wait_until("the job to compute", lambda: computing(far, job_id), timeout_s=90)
            killed.extend(busy(site))
            killed[0].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        executor = on_cluster(far, site)
        lost = attempt(far, executor)
        killer.join()
        assert len(killed) == 1, "one worker computed"
        assert (lost["state"], lost["code"], lost["attempts"]) == ("queued", WorkerLost.code, 0)
        assert "ended while it computed" in lost["reason"]
        far.now += 61
        built = attempt(far, executor)
        assert built["state"] == "built" and len(far.ledger.deliveries(job_id)) == 1
        here = derived_here(near, near.ledger.job(queued(near, settings=LONG)), tmp_path / "here")
        assert len(files(here)) > 24 and files(far.spool.absolute(built["derived_path"])) == files(here)
    site.worker("--resources", "CPU=1")


def test_what_travels_names_no_patient_and_no_object(tmp_path: Path, site: Site,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a series with a telling header: neither name, number, date nor any UID is in its bytes."""
    sent: list[bytes] = []
    real = daskclient.packed

    def packed(value: object) -> bytes:
        sent.append(real(value))
        return sent[-1]

    monkeypatch.setattr(daskclient, "packed", packed)
    pet = pet_series(PatientName="Secret^Person", PatientID="PID-4711", AccessionNumber="ACC-0815")
    paths = []
    for number, dataset in enumerate(pet):
        paths.append(tmp_path / f"{number}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    made = process(paths, [], tmp_path / "out", method="nearest", preset="default", device="auto", threads=1,
                   naming={"software_version": "1"}, now=datetime(2026, 1, 1, tzinfo=UTC),
                   cluster=partial(daskclient.deconvolve, site.address, key="travels"))
    assert made.report["device"] == "cpu", "auto takes what the workers offer, and the report tells it"
    assert len(sent) == 1
    told = [pet[0].PatientName, pet[0].PatientID, pet[0].AccessionNumber, pet[0].StudyInstanceUID,
            pet[0].SeriesInstanceUID, pet[0].SOPInstanceUID, pet[0].FrameOfReferenceUID, pet[0].StudyDate]
    assert [str(text) for text in told if str(text).encode() in sent[0]] == []
    assert pickle.loads(sent[0]).volume.shape == (8, 16, 14)


@pytest.mark.slow
def test_the_default_preset_is_the_same_there_and_here(site: Site) -> None:
    """`best`: image, kernel and uncertainty bit for bit, settings and metrics but for the seconds."""
    phantom = spheres((16, 32, 32)).measured
    there = daskclient.deconvolve(site.address, phantom, None, method="nbd", preset="best", overrides={}, device="cpu",
                                  threads=1, key="best").result
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        here = method("nbd").deconvolve(phantom, method("nbd").settings("best"), device="cpu")
    finally:
        torch.set_num_threads(before)
    assert there.kernel is not None and np.array_equal(there.kernel, here.kernel)
    assert np.array_equal(there.image.array, here.image.array)
    assert there.uncertainty is not None and np.array_equal(there.uncertainty.array, here.uncertainty.array)
    assert dict(there.settings) == dict(here.settings)
    assert {**there.metrics, "seconds": 0} == {**here.metrics, "seconds": 0}


# --- ending it


def test_what_is_given_up_here_ends_on_the_worker_too(site: Site) -> None:
    """The job was cancelled while it computes: the worker's child ends, and the worker is free for the next."""
    def give_up(progress: Progress) -> None:
        if progress.stage == "tv":
            assert len(busy(site)) == 1
            raise Cancelled

    with pytest.raises(Cancelled):
        ask(site, "given-up", give_up, overrides=ENDLESS)
    wait_until("the workers to be idle", lambda: not busy(site), timeout_s=90)


@pytest.mark.slow
def test_a_node_that_stops_puts_the_job_back_and_frees_the_worker(tmp_path: Path, site: Site) -> None:
    """SIGTERM of the node: queued, uncounted, nothing goes on computing for nobody."""
    with lines(tmp_path, "a") as (line,):
        job_id, stop = queued(line, settings=ENDLESS), threading.Event()

        def halt() -> None:
            wait_until("the job to compute", lambda: computing(line, job_id), timeout_s=90)
            stop.set()

        halter = threading.Thread(target=halt)
        halter.start()
        job = attempt(line, on_cluster(line, site), stop)
        halter.join()
        assert (job["state"], job["code"], job["attempts"]) == ("queued", "stopped", 0)
    wait_until("the workers to be idle", lambda: not busy(site), timeout_s=90)


@pytest.mark.slow
def test_a_node_that_is_killed_leaves_no_computation_behind(site: Site) -> None:
    """kill -9 of the process that asked: the scheduler drops its task, the worker's child ends."""
    program = ("import sys; sys.path.insert(0, '.')\nfrom tests.node.test_daskexecutor import *\n"
               f"import types\nask(types.SimpleNamespace(address={site.address!r}), 'killed', overrides=ENDLESS)")
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, env=ENVIRONMENT) as asking:
        wait_until("a worker to compute", lambda: busy(site), timeout_s=90)
        asking.kill()
    wait_until("the workers to be idle", lambda: not busy(site), timeout_s=90)


# --- what the cluster cannot do


def test_a_worker_of_another_version_computes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """UIDs name the software: the job waits, and the reason names both versions and the remedy."""
    monkeypatch.setattr(daskclient, "__version__", "99.1")
    with pytest.raises(ClusterUnavailable, match=r"runs dicomnode \d.*, this node 99\.1.*Remedy: install the same"):
        ask(site, "version")


def test_a_resource_that_nobody_offers_is_waited_for_and_then_named(site: Site) -> None:
    """No GPU in the cluster: progress says what is missing, so that it is no hang; then the remedy."""
    said: list[str] = []
    with pytest.raises(ClusterUnavailable, match=r"none of the \d workers .* resource GPU. Remedy.*--resources"):
        ask(site, "gpu", lambda progress: said.append(progress.stage), device="cuda", patience_s=1.0)
    assert "no worker offers GPU" in said


def test_a_method_that_refuses_there_refuses_as_here(site: Site) -> None:
    """The same error as without a cluster, so that the job is held with the same words."""
    with pytest.raises(ValueError, match="nonsense"):
        ask(site, "unfit", overrides={"nonsense": 1})


def test_without_a_scheduler_jobs_stay_queued_say_why_and_run_when_it_is_back(tmp_path: Path) -> None:
    """Nothing is claimed, one event tells the reason, and it goes with the outage."""
    with lines(tmp_path, "a") as (line,):
        job_id, answers = queued(line), ["down", "down", ""]
        cluster = Cluster(line.ledger, "tcp://127.0.0.1:1", clock=line.clock, probe=lambda _: answers.pop(0))
        claim: dict[str, Any] = {"lease_s": 30.0, "may_start": cluster.may_start()}
        for _ in range(2):
            assert line.ledger.claim("w", now=line.now, **claim) is None
            job = line.ledger.job(job_id)
            assert (job["state"], job["code"], job["reason"], job["attempts"]) == ("queued", WAITS, "down", 0)
            assert line.ledger.claim("w", now=line.now + 1, **claim) is None, "not asked again at once"
            line.now += PROBE_S
        assert line.ledger.count_events(job_id, code=WAITS) == 1
        claimed = line.ledger.claim("w", now=line.now, **claim)
        assert claimed is not None and claimed["state"] == "running"


@pytest.mark.parametrize(("state", "columns", "said"), [
    ("queued", {"code": WAITS}, True), ("queued", {"code": ClusterUnavailable.code}, True), ("queued", {}, False),
    ("running", {"progress": {"stage": "no worker offers GPU"}}, True), ("running", {"progress": None}, False),
    ("running", {"progress": {"stage": "main"}}, False),
])
def test_a_cluster_that_keeps_jobs_waiting_is_a_trouble(tmp_path: Path, state: str, columns: dict[str, Any],
                                                        said: bool) -> None:
    """A person is told while jobs wait for it, and no longer once one computes."""
    with lines(tmp_path, "a") as (line,):
        job_id = queued(line)
        line.ledger.set_job(job_id, state, now=line.now, **columns)
        keys = [one.key for one in troubles.find(line.ledger, line.config, Machine(free_bytes=2**40), now=line.now)]
        assert keys == (["cluster"] if said else [])


def test_a_job_that_is_claimed_again_is_no_proof_that_the_cluster_is_back(tmp_path: Path) -> None:
    """Workers of another version: the job comes and goes, the trouble stays."""
    with lines(tmp_path, "a") as (line,):
        job_id = queued(line)
        line.ledger.set_job(job_id, "running", now=line.now)
        line.ledger.set_job(job_id, "queued", now=line.now, code=ClusterUnavailable.code, reason="other version")
        line.ledger.set_job(job_id, "running", now=line.now, progress=None)
        found = troubles.find(line.ledger, line.config, Machine(free_bytes=2**40), now=line.now)
        assert [one.key for one in found] == ["cluster"] and "other version" not in found[0].text


def test_a_scheduler_that_does_not_answer_is_named_with_the_remedy() -> None:
    """Refused, unknown host, no address at all: a sentence, not an error."""
    for address in (f"tcp://127.0.0.1:{free_port()}", "tcp://no-such-host.invalid:8786", "tcp://host:port", "nonsense"):
        assert address in unreachable(address) and "Remedy" in unreachable(address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert unreachable(f"tcp://127.0.0.1:{server.getsockname()[1]}") == ""


@pytest.mark.slow
def test_a_scheduler_that_goes_in_the_middle_puts_the_job_back(tmp_path: Path) -> None:
    """kill -9 of the scheduler while a job computes: queued again, uncounted; the worker ends its child."""
    own = Site(tmp_path)
    own.worker("--resources", "CPU=1", "--death-timeout", "2")
    try:
        with lines(tmp_path, "a") as (line,):
            job_id = queued(line, settings=ENDLESS)

            def kill() -> None:
                wait_until("the job to compute", lambda: computing(line, job_id), timeout_s=90)
                own.scheduler.kill()

            killer = threading.Thread(target=kill)
            killer.start()
            job = attempt(line, on_cluster(line, own))
            killer.join()
            assert (job["state"], job["attempts"]) == ("queued", 0)
            assert job["code"] in (ClusterUnavailable.code, WorkerLost.code)
        wait_until("the worker to be idle", lambda: not busy(own), timeout_s=90)
    finally:
        own.close()


def test_a_study_that_takes_down_worker_after_worker_is_held(tmp_path: Path) -> None:
    """The first loss is the worker's fault, further ones count as attempts, and then a person is asked."""
    program = f"print({json.dumps(json.dumps({'kind': 'lost', 'code': WorkerLost.code, 'reason': 'worker gone'}))})"
    with lines(tmp_path, "a") as (line,):
        queued(line)
        child = ChildRunner(command=(sys.executable, "-I", "-c", program))
        executor = Executor(line.config, line.ledger, line.spool, clock=line.clock,
                            runner=DaskRunner(Cluster(line.ledger, "tcp://127.0.0.1:1"), child=child))
        states = []
        for _ in range(3):
            job = attempt(line, executor)
            states.append((job["state"], job["attempts"]))
            line.now += 3600
        assert states == [("queued", 0), ("failed", 1), ("held", 2)]
        assert "not the first worker" in job["reason"]


@pytest.mark.slow
def test_a_whole_node_waits_for_its_cluster_and_builds_when_it_comes(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The working process with executor = "dask": no scheduler, so the job waits and says so; then it is built."""
    monkeypatch.setattr("dicomnode.daskexecutor.PROBE_S", 0.5)
    port, stop = free_port(), threading.Event()
    toml = TOML + f'executor = "dask"\ndask_scheduler = "tcp://127.0.0.1:{port}"\ndask_jobs = 2\n'
    site: Site | None = None
    with Line(tmp_path / "node", toml=toml, route=ROUTE) as line:
        job_id = queued(line, "nearest")
        node = threading.Thread(target=work, args=(line.config,), kwargs={"stop": stop, "ready": lambda: None})
        node.start()
        try:
            wait_until("the reason", lambda: line.ledger.job(job_id)["code"] == WAITS, timeout_s=90)
            assert "does not answer" in line.ledger.job(job_id)["reason"]
            site = Site(tmp_path, port=port)
            site.worker("--resources", "CPU=1")
            wait_until("the job to be built", lambda: line.ledger.job(job_id)["derived_path"], timeout_s=90)
        finally:
            stop.set()
            node.join()
            if site is not None:
                site.close()
        job = line.ledger.job(job_id)
        assert job["attempts"] == 1 and job["device"] == "dask"
        assert len(files(line.spool.absolute(job["derived_path"]))) == 24


@pytest.mark.slow
def test_everything_goes_by_tls_and_nobody_without_a_certificate_gets_in(tmp_path: Path) -> None:
    """The settings of docs/scale.md: computed with a certificate of the site's authority, refused with none."""
    authority = Authority(tmp_path)
    ours = authority.issue("ours")
    pair = f"{{cert: {ours.certificate}, key: {ours.key}}}"
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask" / "tls.yaml").write_text(
        "distributed:\n  comm:\n    require-encryption: true\n    tls:\n"
        f"      ca-file: {authority.path}\n      scheduler: {pair}\n      worker: {pair}\n      client: {pair}\n")
    site = Site(tmp_path, protocol="tls", dask=tmp_path / "dask")
    try:
        site.worker("--resources", "CPU=1")
        program = ("import sys, types; sys.path.insert(0, '.')\nfrom tests.node.test_daskexecutor import ask\n"
                   f"made = ask(types.SimpleNamespace(address={site.address!r}), 'tls', method='nearest')\n"
                   "print(made.result.image.shape)")
        wait_until("the scheduler", lambda: not unreachable(site.address), timeout_s=90)
        runs = [subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True,
                               text=True, timeout=90) for environment in (site.environment, ENVIRONMENT)]
    finally:
        site.close()
    assert "(16, 32, 28)" in runs[0].stdout, runs[0].stderr
    assert runs[1].returncode != 0 and "ClusterUnavailable" in runs[1].stderr and "TLS" in runs[1].stderr


# --- the child of the worker


def compute(program: str, wanted: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    answer = remote.compute(b"order", threads=1, say=lambda **_: None, wanted=wanted,
                            command=(sys.executable, "-I", "-c", program))
    return dict(pickle.loads(answer))


@pytest.mark.parametrize(("program", "reason"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9, presumably out of memory"),
    ("import sys; sys.exit('CUDA error: an illegal memory access')", "status 1: CUDA error"),
])
def test_a_computation_that_dies_fails_its_attempt_and_not_its_worker(program: str, reason: str) -> None:
    """Lack of memory, a GPU fault: an answer in words."""
    answer = compute(program)
    assert answer["kind"] == "failed" and reason in answer["reason"]


def test_the_child_of_a_worker_that_is_not_wanted_any_more_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that ignores SIGTERM."""
    monkeypatch.setattr(remote, "GRACE_S", 0.2)
    began = time.monotonic()
    answer = compute("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
                     lambda: time.monotonic() - began < 0.5)
    assert answer["kind"] == "failed" and time.monotonic() - began < 10


def test_arrays_of_an_opened_order_are_locked_as_before() -> None:
    """A volume that travelled cannot be changed either, and has the same bits."""
    order = remote.Order(volume(), None, "tv", "default", {}, "cpu", 1)
    back = remote.opened(remote.packed(order))
    assert np.array_equal(back.volume.array, order.volume.array)
    assert not back.volume.array.flags.writeable and not back.volume.origin.flags.writeable
