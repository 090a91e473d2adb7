-- What people ask for. The views read the events through functions whose bodies are text: so nothing depends on the table of
-- events, and its owner may alter or drop it. Postgres inlines them: conditions on a view reach the table.
SET LOCAL check_function_bodies = off;
CREATE OR REPLACE FUNCTION {ledger}.{turns}()
RETURNS TABLE ("time" timestamptz, session text, project text, actor text, kind text, provenance text, "text" text, model text)
LANGUAGE sql STABLE AS $_$
SELECT "timestamp", payload->>'session_uuid', payload->>'project_path', payload->>'actor', payload->>'kind',
       payload->>'provenance', payload->>'text', payload->>'model'
  FROM {events} WHERE event_type = 'turn_detected'
$_$;
CREATE OR REPLACE VIEW {ledger}.turns AS SELECT * FROM {ledger}.{turns}();
COMMENT ON VIEW {ledger}.turns IS 'headspace-watcher: what was said';
CREATE OR REPLACE FUNCTION {ledger}.{sessions}()
RETURNS TABLE (session text, project text, began timestamptz, last_activity timestamptz, ended timestamptz, reason text, turns bigint)
LANGUAGE sql STABLE AS $_$
SELECT session, project, began, last_activity,
       -- One that was resumed goes on.
       CASE WHEN last_end >= coalesce(last_turn, last_end) THEN last_end END,
       CASE WHEN last_end >= coalesce(last_turn, last_end) THEN last_reason END,
       turns
  FROM (SELECT payload->>'session_uuid' AS session,
               coalesce(min(payload->>'project_path') FILTER (WHERE event_type = 'session_registered'),
                        min(payload->>'project_path')) AS project,
               min("timestamp") AS began,
               max("timestamp") FILTER (WHERE event_type <> 'session_ended') AS last_activity,
               max("timestamp") FILTER (WHERE event_type = 'turn_detected') AS last_turn,
               max("timestamp") FILTER (WHERE event_type = 'session_ended') AS last_end,
               (array_agg(payload->>'reason' ORDER BY "timestamp" DESC)
                  FILTER (WHERE event_type = 'session_ended'))[1] AS last_reason,
               count(*) FILTER (WHERE event_type = 'turn_detected') AS turns
          FROM {events} WHERE payload->>'session_uuid' IS NOT NULL GROUP BY 1) AS found
$_$;
CREATE OR REPLACE VIEW {ledger}.sessions AS SELECT * FROM {ledger}.{sessions}();
COMMENT ON VIEW {ledger}.sessions IS 'headspace-watcher: sessions'
