-- Stores one event exactly once. Gives whether it was new; null where the event before it was not dealt with in this
-- delivery: then nothing was done.
--
-- The receipt refuses a second copy. A copy marks the receipt, so that the event after it finds it dealt with, and so that
-- its commit writes: a transaction that writes nothing flushes nothing.
CREATE OR REPLACE FUNCTION {ledger}.{store}(
  _durable boolean, _host text, _window_time timestamptz, _predecessor uuid, _predecessor_time timestamptz,
  _event_id uuid, _path text, _byte_offset bigint, _captured_at timestamptz,
  _timestamp timestamptz, _event_type text, _payload bytea,
  _project_id integer, _agent_id integer, _command_id integer, _turn_id integer
) RETURNS boolean LANGUAGE plpgsql AS $store$
DECLARE
  _setting text;
  _source_id bigint;
  _row_id bigint;
  _is_new boolean;
  _json jsonb;
  _found_project integer;
  _found_agent integer;
BEGIN
  -- Plans are kept while the ledger grows: they must not be those for an empty table.
  _setting := set_config('enable_seqscan', 'off', true) ||
    CASE WHEN _durable THEN {flush} ELSE set_config('synchronous_commit', 'off', true) END;
  IF _predecessor IS NOT NULL AND NOT EXISTS (
       SELECT FROM {ledger}.event_receipts
        WHERE event_id = _predecessor AND _predecessor_time IN (delivered_at, seen_again_at)) THEN
    RETURN NULL;
  END IF;
  UPDATE {ledger}.event_receipts SET seen_again_at = _window_time WHERE event_id = _event_id;
  IF FOUND THEN
    RETURN false;
  END IF;
  _json := convert_from(_payload, 'UTF8')::jsonb;
  SELECT id INTO _source_id FROM {ledger}.event_sources WHERE host = _host AND path = _path;
  IF NOT FOUND THEN
    INSERT INTO {ledger}.event_sources AS s (host, path) VALUES (_host, _path)
    ON CONFLICT (host, path) DO UPDATE SET path = s.path RETURNING id INTO _source_id;
  END IF;
  _row_id := {next_id};
  INSERT INTO {ledger}.event_receipts AS r (event_id, row_id, source_id, byte_offset, captured_at, delivered_at)
  VALUES (_event_id, _row_id, _source_id, _byte_offset, _captured_at, _window_time)
  ON CONFLICT (event_id) DO UPDATE SET seen_again_at = _window_time
  RETURNING r.seen_again_at IS NULL INTO _is_new;
  IF NOT _is_new THEN
    -- Another watcher has stored it since we looked.
    RETURN false;
  END IF;
  {insert}
  -- A trigger may store the row elsewhere (inheritance), and may drop it.
  IF NOT FOUND AND NOT EXISTS (SELECT FROM {events} WHERE id = _row_id) THEN
    RAISE EXCEPTION 'a trigger on % drops rows', {events_literal} USING ERRCODE = '{row_dropped}';
  END IF;
  {notify}
  RETURN true;
END
$store$
