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
