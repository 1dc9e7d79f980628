-- The schema as version 2 of the ledger had it; never changed again.
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
    released           INTEGER NOT NULL DEFAULT 0  -- a person said: process it all the same
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS series_study ON series (study_uid);
CREATE INDEX IF NOT EXISTS series_state ON series (state, last_at);

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
    report             TEXT                  -- JSON: checks, gates, metrics
);
CREATE INDEX IF NOT EXISTS job_state ON job (state, run_after);
CREATE INDEX IF NOT EXISTS job_series ON job (series_uid);
CREATE INDEX IF NOT EXISTS job_derived ON job (derived_series_uid);

CREATE TABLE IF NOT EXISTS delivery (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id     INTEGER NOT NULL REFERENCES job (id),
    peer       TEXT NOT NULL,
    state      TEXT NOT NULL,               -- waiting, delivered, dead
    reason     TEXT NOT NULL DEFAULT '',
    attempts   INTEGER NOT NULL DEFAULT 0,
    next_at    REAL NOT NULL,
    created_at REAL NOT NULL,
    done_at    REAL,
    UNIQUE (job_id, peer)
);

CREATE TABLE IF NOT EXISTS delivery_instance (
    delivery_id      INTEGER NOT NULL REFERENCES delivery (id),
    sop_instance_uid TEXT NOT NULL,
    status           INTEGER NOT NULL,      -- C-STORE status of the last attempt
    comment          TEXT NOT NULL DEFAULT '',
    at               REAL NOT NULL,
    PRIMARY KEY (delivery_id, sop_instance_uid)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS event (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    at         REAL NOT NULL,
    study_uid  TEXT NOT NULL DEFAULT '',
    series_uid TEXT NOT NULL DEFAULT '',
    job_id     INTEGER,
    kind       TEXT NOT NULL,               -- series, job, delivery, psf, reception, security
    from_state TEXT NOT NULL DEFAULT '',
    to_state   TEXT NOT NULL DEFAULT '',
    code       TEXT NOT NULL DEFAULT '',
    reason     TEXT NOT NULL DEFAULT '',
    actor      TEXT NOT NULL DEFAULT 'node'
);
CREATE INDEX IF NOT EXISTS event_study ON event (study_uid, id);
CREATE INDEX IF NOT EXISTS event_series ON event (series_uid, id);

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
