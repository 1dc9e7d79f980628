-- The node's memory. One statement or script per name; ledger.py calls the name.
-- Times are seconds since 1970-01-01 UTC.

-- name: schema
CREATE TABLE IF NOT EXISTS instance (
    sop_instance_uid    TEXT PRIMARY KEY,
    sop_class_uid       TEXT NOT NULL,
    study_uid           TEXT NOT NULL,
    series_uid          TEXT NOT NULL,
    transfer_syntax_uid TEXT NOT NULL,
    path                TEXT NOT NULL,      -- relative to the data directory
    bytes               INTEGER NOT NULL,
    sha256              TEXT NOT NULL,      -- of the data set as received, without file meta information
    calling_ae          TEXT NOT NULL,
    address             TEXT NOT NULL,
    received_at         REAL NOT NULL,
    position            TEXT,               -- ImagePositionPatient, JSON
    orientation         TEXT,               -- ImageOrientationPatient, JSON
    frames              INTEGER NOT NULL DEFAULT 1
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS instance_series ON instance (series_uid);

CREATE TABLE IF NOT EXISTS conflict (       -- other bytes under a known SOP Instance UID: kept, never used
    sop_instance_uid TEXT NOT NULL,
    sha256           TEXT NOT NULL,
    series_uid       TEXT NOT NULL,
    study_uid        TEXT NOT NULL,
    path             TEXT NOT NULL,
    bytes            INTEGER NOT NULL,
    calling_ae       TEXT NOT NULL,
    address          TEXT NOT NULL,
    received_at      REAL NOT NULL,
    accepted         INTEGER NOT NULL DEFAULT 0,  -- a person looked and released the series
    PRIMARY KEY (sop_instance_uid, sha256)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS conflict_series ON conflict (series_uid);

CREATE TABLE IF NOT EXISTS series (
    series_uid         TEXT PRIMARY KEY,
    study_uid          TEXT NOT NULL,
    modality           TEXT NOT NULL,
    accession_number   TEXT NOT NULL,
    series_number      TEXT NOT NULL,
    series_description TEXT NOT NULL,
    calling_ae         TEXT NOT NULL,
    state              TEXT NOT NULL,
    code               TEXT NOT NULL DEFAULT '',
    reason             TEXT NOT NULL DEFAULT '',
    until              REAL,                -- waiting: look again then
    first_at           REAL NOT NULL,
    last_at            REAL NOT NULL,       -- last new instance
    instances          INTEGER NOT NULL,
    is_guide           INTEGER NOT NULL DEFAULT 0,
    released           INTEGER NOT NULL DEFAULT 0, -- a person said: process it all the same
    purged_at          REAL                        -- its files were removed then (since version 3)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS series_study ON series (study_uid);
CREATE INDEX IF NOT EXISTS series_state ON series (state, last_at);
CREATE INDEX IF NOT EXISTS series_newest ON series (first_at DESC, series_uid);  -- since version 3
CREATE INDEX IF NOT EXISTS series_accession ON series (accession_number);  -- since version 3
CREATE INDEX IF NOT EXISTS series_from ON series (calling_ae, first_at);  -- since version 3

CREATE TABLE IF NOT EXISTS job (
    id                 INTEGER PRIMARY KEY AUTOINCREMENT,
    identity           TEXT NOT NULL UNIQUE, -- digest of inputs, method, full settings, software version
    series_uid         TEXT NOT NULL,
    study_uid          TEXT NOT NULL,
    guide_series_uid   TEXT,
    route              TEXT NOT NULL,
    method             TEXT NOT NULL,
    preset             TEXT NOT NULL,
    settings           TEXT NOT NULL,        -- JSON
    send_to            TEXT NOT NULL,        -- JSON list of peer names
    inputs             TEXT NOT NULL,        -- JSON list of source SOP Instance UIDs
    state              TEXT NOT NULL,
    code               TEXT NOT NULL DEFAULT '',
    reason             TEXT NOT NULL DEFAULT '',
    attempts           INTEGER NOT NULL DEFAULT 0,
    priority           INTEGER NOT NULL DEFAULT 0,
    run_after          REAL NOT NULL,
    lease_owner        TEXT,
    lease_until        REAL,
    progress           TEXT,                 -- JSON: stage, step, steps, loss
    created_at         REAL NOT NULL,
    started_at         REAL,
    built_at           REAL,
    finished_at        REAL,
    derived_series_uid TEXT,
    derived_path       TEXT,                 -- folder relative to the data directory
    derived_instances  INTEGER,
    report             TEXT,                 -- JSON: checks, gates, metrics
    urgent             INTEGER NOT NULL DEFAULT 0,  -- starts outside the windows, before all others (since version 3)
    memory_gb          REAL,                 -- after a lack of memory: what the next attempt may use (since version 3)
    device             TEXT,                 -- where it ran (since version 3)
    purged_at          REAL                  -- the derived files were removed then (since version 3)
);
CREATE INDEX IF NOT EXISTS job_state ON job (state, run_after);
-- All that a claim looks at: a job's row is long (its inputs), and workers ask twice a second (since version 3).
CREATE INDEX IF NOT EXISTS job_turn ON job (state, run_after, route, urgent, priority, lease_until);
CREATE INDEX IF NOT EXISTS job_series ON job (series_uid);
CREATE INDEX IF NOT EXISTS job_derived ON job (derived_series_uid);
CREATE INDEX IF NOT EXISTS job_finished ON job (finished_at) WHERE finished_at IS NOT NULL;  -- since version 3

CREATE TABLE IF NOT EXISTS delivery (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id     INTEGER NOT NULL REFERENCES job (id),
    peer       TEXT NOT NULL,
    state      TEXT NOT NULL,               -- waiting, delivered, committed, dead
    reason     TEXT NOT NULL DEFAULT '',
    attempts   INTEGER NOT NULL DEFAULT 0,
    next_at    REAL NOT NULL,
    created_at REAL NOT NULL,
    done_at    REAL,
    confirm    TEXT NOT NULL DEFAULT 'store', -- proof wanted beyond the answers: find, commitment (since version 3)
    proofs     INTEGER NOT NULL DEFAULT 0,    -- attempts at that proof (since version 3)
    prove_at   REAL,                        -- delivered: when to look after the proof (since version 3)
    UNIQUE (job_id, peer)
);
CREATE INDEX IF NOT EXISTS delivery_state ON delivery (state, next_at);  -- since version 3
CREATE INDEX IF NOT EXISTS delivery_peer ON delivery (peer, state, done_at);  -- since version 3
CREATE INDEX IF NOT EXISTS delivery_proof ON delivery (prove_at) WHERE prove_at IS NOT NULL;

CREATE TABLE IF NOT EXISTS delivery_instance (
    delivery_id      INTEGER NOT NULL REFERENCES delivery (id),
    sop_instance_uid TEXT NOT NULL,
    status           INTEGER NOT NULL,      -- C-STORE status of the last attempt
    comment          TEXT NOT NULL DEFAULT '',
    at               REAL NOT NULL,
    committed_at     REAL,                  -- the peer has committed to keep it (since version 3)
    PRIMARY KEY (delivery_id, sop_instance_uid)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS event (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    at         REAL NOT NULL,
    study_uid  TEXT NOT NULL DEFAULT '',
    series_uid TEXT NOT NULL DEFAULT '',
    job_id     INTEGER,
    kind       TEXT NOT NULL,               -- series, job, delivery, psf, reception, security, source, node
    from_state TEXT NOT NULL DEFAULT '',
    to_state   TEXT NOT NULL DEFAULT '',
    code       TEXT NOT NULL DEFAULT '',
    reason     TEXT NOT NULL DEFAULT '',
    actor      TEXT NOT NULL DEFAULT 'node'
);
CREATE INDEX IF NOT EXISTS event_study ON event (study_uid, id);
CREATE INDEX IF NOT EXISTS event_series ON event (series_uid, id);
CREATE INDEX IF NOT EXISTS event_job ON event (job_id, code) WHERE job_id IS NOT NULL;  -- since version 3
-- What belongs to no study: few among millions (since version 3).
CREATE INDEX IF NOT EXISTS event_of_node ON event (id) WHERE kind NOT IN ('series', 'job', 'delivery');

CREATE TABLE IF NOT EXISTS psf (            -- the PSF library (since version 2)
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    scanner_key      TEXT NOT NULL,         -- JSON, keys sorted: sop.scanner.ScannerKey
    kind             TEXT NOT NULL,         -- measured (calibrate), found (in a study)
    source           TEXT NOT NULL,         -- measured: phantom's series UID; found: derived series UID
    study_uid        TEXT NOT NULL,
    series_uid       TEXT NOT NULL,         -- the PET series it was measured or found on
    job_id           INTEGER,               -- found: the job
    fwhm_mm          TEXT NOT NULL,         -- JSON [d, h, w]
    log_sd           TEXT NOT NULL,         -- JSON [d, h, w], standard errors of ln FWHM
    skew             TEXT NOT NULL,         -- JSON [d, h, w]
    skew_sd          TEXT NOT NULL,         -- JSON [d, h, w]
    detail           TEXT NOT NULL,         -- JSON: spheres, residual, notes; settings of the job
    software_version TEXT NOT NULL,
    at               REAL NOT NULL,
    forgotten_at     REAL,                  -- a person took it out; kept for provenance
    UNIQUE (kind, source)
);
CREATE INDEX IF NOT EXISTS psf_key ON psf (scanner_key);

-- Since version 3.

CREATE TABLE IF NOT EXISTS commitment (     -- storage commitment that we asked a peer for (PS3.4 Annex J)
    transaction_uid TEXT PRIMARY KEY,
    delivery_id     INTEGER NOT NULL REFERENCES delivery (id),
    ae_title        TEXT NOT NULL,          -- whom we asked: nobody else may answer
    items           TEXT NOT NULL,          -- JSON: [SOP Instance UID, ...]; [] once it is answered
    state           TEXT NOT NULL,          -- asked, confirmed, failed, late
    reason          TEXT NOT NULL DEFAULT '',
    asked_at        REAL NOT NULL,
    due_at          REAL NOT NULL,          -- without an answer until then: asked again; it still counts when it comes
    answered_at     REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS commitment_delivery ON commitment (delivery_id, asked_at);
CREATE INDEX IF NOT EXISTS commitment_state ON commitment (state, due_at);

CREATE TABLE IF NOT EXISTS commitment_request (  -- storage commitment that a peer asked us for
    transaction_uid TEXT NOT NULL,
    calling_ae      TEXT NOT NULL,
    address         TEXT NOT NULL,
    items           TEXT NOT NULL,          -- JSON: [[SOP Class UID, SOP Instance UID], ...]; [] once it is over
    state           TEXT NOT NULL,          -- waiting, answered, given-up
    reason          TEXT NOT NULL DEFAULT '',
    attempts        INTEGER NOT NULL DEFAULT 0,
    asked_at        REAL NOT NULL,
    next_at         REAL NOT NULL,
    answered_at     REAL,
    PRIMARY KEY (transaction_uid, calling_ae)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS commitment_request_state ON commitment_request (state, next_at);

CREATE TABLE IF NOT EXISTS source_series (  -- what a source (PACS) says it has, by C-FIND
    source           TEXT NOT NULL,         -- peer's name
    series_uid       TEXT NOT NULL,
    study_uid        TEXT NOT NULL,
    study_date       TEXT NOT NULL DEFAULT '',
    modality         TEXT NOT NULL DEFAULT '',
    accession_number TEXT NOT NULL DEFAULT '',
    instances        INTEGER,               -- NumberOfSeriesRelatedInstances; NULL: the source does not say
    wanted           INTEGER NOT NULL,      -- whether a route would want it
    reason           TEXT NOT NULL DEFAULT '',
    state            TEXT NOT NULL,         -- seen, retrieving, arrived, failed
    attempts         INTEGER NOT NULL DEFAULT 0,
    next_at          REAL,
    first_seen_at    REAL NOT NULL,
    last_seen_at     REAL NOT NULL,
    PRIMARY KEY (source, series_uid)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS source_series_state ON source_series (state, next_at);

CREATE TABLE IF NOT EXISTS worker (         -- who works now; a row goes when its process ends in good order
    name         TEXT PRIMARY KEY,
    device       TEXT NOT NULL,
    pid          INTEGER NOT NULL,
    started_at   REAL NOT NULL,
    heartbeat_at REAL NOT NULL,
    job_id       INTEGER
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS alert (
    key         TEXT PRIMARY KEY,           -- one thing that is wrong, e.g. "job:12:attempts"
    level       TEXT NOT NULL,              -- warning, problem
    text        TEXT NOT NULL,
    first_at    REAL NOT NULL,
    last_at     REAL NOT NULL,
    sent_at     REAL,
    resolved_at REAL
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS memo (           -- small facts that outlive a process: when a nightly task last ran
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- name: add_instance
INSERT INTO instance VALUES (
    :sop_instance_uid, :sop_class_uid, :study_uid, :series_uid, :transfer_syntax_uid, :path, :bytes, :sha256,
    :calling_ae, :address, :received_at, :position, :orientation, :frames);

-- name: touch_series
INSERT INTO series (series_uid, study_uid, modality, accession_number, series_number, series_description, calling_ae,
                    state, first_at, last_at, instances)
VALUES (:series_uid, :study_uid, :modality, :accession_number, :series_number, :series_description, :calling_ae,
        'receiving', :received_at, :received_at, 1)
ON CONFLICT (series_uid) DO UPDATE SET last_at = max(last_at, excluded.last_at), instances = instances + 1;

-- name: add_conflict
INSERT OR IGNORE INTO conflict VALUES (
    :sop_instance_uid, :sha256, :series_uid, :study_uid, :path, :bytes, :calling_ae, :address, :received_at, 0);

-- name: add_event
INSERT INTO event (at, study_uid, series_uid, job_id, kind, from_state, to_state, code, reason, actor)
VALUES (:at, :study_uid, :series_uid, :job_id, :kind, :from_state, :to_state, :code, :reason, :actor);

-- name: due_series
SELECT * FROM series
 WHERE (state = 'receiving' AND last_at <= :quiet_before) OR (state = 'waiting' AND until <= :now)
 ORDER BY last_at, series_uid;

-- name: add_job
INSERT INTO job (identity, series_uid, study_uid, guide_series_uid, route, method, preset, settings, send_to, inputs,
                 state, priority, urgent, run_after, created_at)
VALUES (:identity, :series_uid, :study_uid, :guide_series_uid, :route, :method, :preset, :settings, :send_to, :inputs,
        'queued', :priority, :urgent, :now, :now)
ON CONFLICT (identity) DO NOTHING;

-- name: waiting_routes
SELECT DISTINCT route FROM job WHERE state IN ('queued', 'failed') AND run_after <= :now AND NOT urgent;

-- name: claimable
-- :closed is a JSON list of routes whose jobs may not start now.
SELECT * FROM job WHERE id = (
    SELECT id FROM job
     WHERE (state IN ('queued', 'failed') AND run_after <= :now
            AND (urgent OR route NOT IN (SELECT value FROM json_each(:closed))))
        OR (state = 'running' AND lease_until < :now)
     ORDER BY urgent DESC, priority DESC, id LIMIT 1);

-- name: due_deliveries
SELECT delivery.* FROM delivery JOIN job ON job.id = delivery.job_id
 WHERE delivery.state = 'waiting' AND delivery.next_at <= :now AND job.state IN ('built', 'sending')
 ORDER BY job.urgent DESC, job.priority DESC, delivery.next_at, delivery.id;

-- name: put_status
INSERT INTO delivery_instance VALUES (:delivery_id, :sop_instance_uid, :status, :comment, :at, NULL)
ON CONFLICT (delivery_id, sop_instance_uid)
DO UPDATE SET status = excluded.status, comment = excluded.comment, at = excluded.at;

-- name: put_psf
INSERT INTO psf (scanner_key, kind, source, study_uid, series_uid, job_id, fwhm_mm, log_sd, skew, skew_sd, detail,
                 software_version, at)
VALUES (:scanner_key, :kind, :source, :study_uid, :series_uid, :job_id, :fwhm_mm, :log_sd, :skew, :skew_sd, :detail,
        :software_version, :at)
ON CONFLICT (kind, source) DO UPDATE SET
    scanner_key = excluded.scanner_key, fwhm_mm = excluded.fwhm_mm, log_sd = excluded.log_sd, skew = excluded.skew,
    skew_sd = excluded.skew_sd, detail = excluded.detail, software_version = excluded.software_version,
    at = excluded.at, forgotten_at = CASE WHEN excluded.kind = 'measured' THEN NULL ELSE forgotten_at END;

-- name: overview
-- One row per series, all or those of one of the next two: the newest job's state where there is one, else its own.
SELECT s.study_uid, s.series_uid, s.modality, s.accession_number, s.series_number, s.series_description,
       s.instances, s.calling_ae, s.first_at, s.last_at,
       s.state AS series_state, s.code AS series_code, s.reason AS series_reason, s.until,
       j.id AS job_id, j.state AS job_state, j.code AS job_code, j.reason AS job_reason, j.route, j.method, j.preset,
       j.guide_series_uid, j.attempts, j.progress, j.derived_series_uid, j.derived_instances,
       j.created_at, j.started_at, j.built_at, j.finished_at
  FROM {series} s LEFT JOIN job j ON j.id = (SELECT max(id) FROM job WHERE job.series_uid = s.series_uid)
 ORDER BY s.first_at DESC, s.series_uid LIMIT :limit;

-- name: named_series
SELECT * FROM series WHERE series_uid IN (
    SELECT series_uid FROM series WHERE study_uid = :study
    UNION SELECT series_uid FROM series WHERE series_uid = :study
    UNION SELECT series_uid FROM series WHERE accession_number = :study
    UNION SELECT series_uid FROM job WHERE derived_series_uid = :study)

-- name: active_series
SELECT * FROM series WHERE state = 'held' OR series_uid IN (
    SELECT series_uid FROM job WHERE state IN ('held', 'running'))
