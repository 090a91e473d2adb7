-- Has the server plan the row of an event, and nothing more: whether the columns take what it gives them.
EXPLAIN INSERT INTO {events} (id, "timestamp", event_type, payload, project_id, agent_id, {command}, turn_id)
OVERRIDING SYSTEM VALUE
VALUES ({next_id}, now(), NULL::text, NULL::jsonb, NULL::int, NULL::int, NULL::int, NULL::int)
