  _json := convert_from({payload}, 'UTF8')::jsonb;
  _row_id := {next_id};
  -- Refuses a second copy that came by another way at this very moment.
  INSERT INTO {ledger}.event_receipts (event_id, row_id, source_id, byte_offset, captured_at, delivered_at)
  VALUES ({event_id}, _row_id, _source_id, {byte_offset}, {captured_at}, _window_time);
  {insert}
  -- A trigger may store the row elsewhere (inheritance), and may drop it.
  IF NOT FOUND THEN
    IF NOT EXISTS (SELECT FROM {events} WHERE id = _row_id) THEN
      RAISE EXCEPTION 'a trigger on % drops rows', {events_literal} USING ERRCODE = '{row_dropped}';
    END IF;
  END IF;
  {notify}
