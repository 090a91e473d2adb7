-- Stores one event exactly once. Returns whether it was new; null where the event before it was not dealt with in this
-- delivery: then nothing was done.
--
-- The receipt refuses a second copy. A copy marks the receipt, so that the event after it finds it dealt with, and so that
-- its commit writes: a transaction that writes nothing flushes nothing.
CREATE OR REPLACE FUNCTION {ledger}.{store}(
  _durable boolean, _window_time timestamptz, _predecessor uuid, _predecessor_time timestamptz,
  -- Whether it may have been stored before.
  _is_known boolean,
  _event_id uuid, _source_id bigint, _byte_offset bigint, _captured_at timestamptz,
  _timestamp timestamptz, _event_type text, _payload bytea,
  _project_id integer, _agent_id integer, _command_id integer, _turn_id integer
) RETURNS boolean LANGUAGE plpgsql AS $store$
DECLARE
  _setting text;
  _row_id bigint;
  _json jsonb;
  _found_project integer;
  _found_agent integer;
BEGIN
  IF _durable THEN
    _setting := {flush};
  END IF;
  -- Two conditions: one with a query in it would be run as one, for each event.
  IF _predecessor IS NOT NULL THEN
    IF NOT EXISTS (SELECT FROM {ledger}.event_receipts
                    WHERE event_id = _predecessor AND _predecessor_time IN (delivered_at, seen_again_at)) THEN
      RETURN NULL;
    END IF;
  END IF;
  IF _is_known THEN
    UPDATE {ledger}.event_receipts SET seen_again_at = _window_time WHERE event_id = _event_id;
    IF FOUND THEN
      RETURN false;
    END IF;
  END IF;
{row_of_one}
  RETURN true;
END
$store$
