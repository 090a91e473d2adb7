-- Stores the events of a window, each in a transaction of its own. `_repeated`: the places, from 1 on, of those that had been
-- stored before; null where the event before the window was not dealt with: then nothing was done.
--
-- Proves no durability: once the CALL's statement_timeout has fired, a COMMIT in it does not wait for a synchronous standby. So
-- all its commits are asynchronous, and a statement behind it makes them durable.
CREATE OR REPLACE PROCEDURE {ledger}.{deliver}(
  _host text, _window_time timestamptz, _predecessor uuid, _predecessor_time timestamptz,
  _event_ids uuid[], _paths text[], _byte_offsets bigint[], _captured_at timestamptz[],
  _timestamps timestamptz[], _event_types text[], _payloads bytea[],
  _project_ids integer[], _agent_ids integer[], _command_ids integer[], _turn_ids integer[],
  INOUT _repeated integer[]
) LANGUAGE plpgsql AS $deliver$
DECLARE
  _setting text;
  _is_any_known boolean;
  _path text;
  _source_id bigint;
  _is_new boolean;
  _row_id bigint;
  _json jsonb;
  _found_project integer;
  _found_agent integer;
BEGIN
  _repeated := '{}';
  -- Plans are kept while the ledger grows: they must not be those for an empty table.
  _setting := set_config('enable_seqscan', 'off', true);
  _is_any_known := EXISTS (SELECT FROM {ledger}.event_receipts WHERE event_id = ANY (_event_ids));
  FOR _i IN 1 .. cardinality(_event_ids) LOOP
    _setting := set_config('synchronous_commit', 'off', true);
    IF _path IS DISTINCT FROM _paths[_i] THEN
      _path := _paths[_i];
      _source_id := {ledger}.{source}(_host, _path);
    END IF;
    IF _is_any_known OR _i = 1 THEN
      _setting := set_config('enable_seqscan', 'off', true);
      _is_new := {ledger}.{store}(
        false, _window_time, CASE WHEN _i = 1 THEN _predecessor END, _predecessor_time, _is_any_known,
        _event_ids[_i], _source_id, _byte_offsets[_i], _captured_at[_i],
        _timestamps[_i], _event_types[_i], _payloads[_i],
        _project_ids[_i], _agent_ids[_i], _command_ids[_i], _turn_ids[_i]);
      IF _is_new IS NULL THEN
        _repeated := NULL;
        EXIT;
      ELSIF NOT _is_new THEN
        _repeated := _repeated || _i;
      END IF;
    ELSE
      -- What the function does, without the cost of calling it.
{row_of_window}
    END IF;
    COMMIT;
  END LOOP;
END
$deliver$
