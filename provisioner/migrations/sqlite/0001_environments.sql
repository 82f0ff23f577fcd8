-- One row per environment. `state` is the whole truth; the columns beside it are copies the database has to index.
CREATE TABLE environments (
    id                   TEXT    NOT NULL PRIMARY KEY, -- UUIDv7, so the order of ids is the order of creation
    account_id           TEXT    NOT NULL,
    generation           INTEGER NOT NULL,
    run                  INTEGER NOT NULL,
    region               TEXT    NOT NULL,
    size                 TEXT    NOT NULL,
    image                TEXT    NOT NULL,
    created_at           TEXT    NOT NULL,             -- RFC 3339, as all times here
    updated_at           TEXT    NOT NULL,
    status               TEXT    NOT NULL,
    settled              INTEGER NOT NULL,             -- 1: the loop has nothing to do here
    enrolment_token_hash BLOB,                         -- of the present attempt
    state                TEXT    NOT NULL              -- JSON
) STRICT;

-- However many ask at once: one account, one environment.
CREATE UNIQUE INDEX environments_one_live_per_account ON environments (account_id) WHERE status <> 'deprovisioned';
CREATE INDEX environments_by_account ON environments (account_id, id);
CREATE INDEX environments_by_status ON environments (status, id);
CREATE INDEX environments_unsettled ON environments (id) WHERE settled = 0;
CREATE UNIQUE INDEX environments_by_token ON environments (enrolment_token_hash) WHERE enrolment_token_hash IS NOT NULL;

CREATE TABLE environment_events (
    sequence       INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    environment_id TEXT    NOT NULL REFERENCES environments (id),
    run            INTEGER NOT NULL,
    at             TEXT    NOT NULL,
    status         TEXT    NOT NULL,
    phase          TEXT,
    message        TEXT    NOT NULL
) STRICT;
CREATE INDEX environment_events_by_run ON environment_events (environment_id, run, sequence);
CREATE INDEX environment_events_by_age ON environment_events (at);

-- Whose an agent is.
CREATE TABLE agents (
    agent_id    TEXT    NOT NULL PRIMARY KEY,
    account_id  TEXT    NOT NULL,
    owner_known INTEGER NOT NULL,                      -- 0: nobody said, so it is its own account
    bound_at    TEXT    NOT NULL
) STRICT;

-- The latest report of each agent.
CREATE TABLE heartbeats (
    environment_id TEXT NOT NULL PRIMARY KEY,
    received_at    TEXT NOT NULL,
    payload        TEXT NOT NULL                       -- JSON
) STRICT;

-- What agents are told, so that a change of it gets a higher generation.
CREATE TABLE agent_settings (
    only_row   INTEGER NOT NULL PRIMARY KEY CHECK (only_row = 1),
    generation INTEGER NOT NULL,
    content    TEXT    NOT NULL
) STRICT;
