-- One row per rollout. `state` holds what was asked for and how far it is; the columns beside it are copies the database has to index.
CREATE TABLE rollouts (
    id         TEXT    NOT NULL PRIMARY KEY, -- UUIDv7
    version    TEXT    NOT NULL,
    status     TEXT    NOT NULL,
    open       INTEGER NOT NULL,             -- 1: something can still come of it
    started_at TEXT    NOT NULL,
    updated_at TEXT    NOT NULL,
    state      TEXT    NOT NULL              -- JSON
) STRICT;

-- However many start one at once: one is under way.
CREATE UNIQUE INDEX rollouts_one_open ON rollouts (open) WHERE open = 1;
CREATE INDEX rollouts_by_status ON rollouts (status, id);

-- One row per agent of a rollout. `state` is the whole truth.
CREATE TABLE rollout_targets (
    rollout_id     TEXT    NOT NULL REFERENCES rollouts (id),
    environment_id TEXT    NOT NULL,
    wave           INTEGER NOT NULL,
    standing       TEXT    NOT NULL,
    state          TEXT    NOT NULL,         -- JSON
    PRIMARY KEY (rollout_id, environment_id)
) STRICT, WITHOUT ROWID;

-- What was decided about updates of single environments.
CREATE TABLE update_preferences (
    environment_id TEXT    NOT NULL PRIMARY KEY,
    pin            TEXT,                     -- the only version its agent is ever told
    excluded       INTEGER NOT NULL,         -- 1: it is told none
    changed_at     TEXT    NOT NULL
) STRICT;
