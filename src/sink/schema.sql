-- What headspace-watcher needs in Postgres. {schema} and {events} stand for names from the configuration.
-- Every statement leaves alone what is already there.

-- The events. Other programs may own this table: it is created where it is missing and never altered.
CREATE TABLE {schema}.{events} (
    id          serial PRIMARY KEY,
    "timestamp" timestamptz NOT NULL,   -- when it happened
    project_id  integer,
    agent_id    integer,
    command_id  integer,
    turn_id     integer,
    event_type  varchar(50) NOT NULL,
    payload     jsonb
);
CREATE INDEX ON {schema}.{events} ("timestamp");
CREATE INDEX ON {schema}.{events} (project_id);
CREATE INDEX ON {schema}.{events} (agent_id);
CREATE INDEX ON {schema}.{events} (command_id);
CREATE INDEX ON {schema}.{events} (turn_id);
CREATE INDEX ON {schema}.{events} (event_type);
CREATE INDEX ON {schema}.{events} (project_id, "timestamp");
CREATE INDEX ON {schema}.{events} (agent_id, "timestamp");
CREATE INDEX ON {schema}.{events} (event_type, "timestamp");
-- ledger
-- The ledger that makes delivery exactly-once: written in the same transaction as the event's row.
CREATE TABLE IF NOT EXISTS {schema}.event_receipts (
    event_id      uuid PRIMARY KEY,
    row_id        bigint NOT NULL,      -- {events}.id
    source_id     integer NOT NULL,     -- event_sources.id
    byte_offset   bigint,               -- of the line in its transcript
    captured_at   timestamptz NOT NULL, -- when it was accepted into the local queue
    delivered_at  timestamptz NOT NULL, -- when it was sent here
    seen_again_at timestamptz           -- when the same event was last sent again, and not stored again
);
CREATE TABLE IF NOT EXISTS {schema}.event_sources (
    id   serial PRIMARY KEY,
    host text NOT NULL,
    path text NOT NULL,                 -- of the transcript; else hook, http or cli
    UNIQUE (host, path)
);
