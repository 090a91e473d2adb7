-- An earlier version kept its tables beside the events: their rows are taken over.
LOCK TABLE {earlier}.event_receipts, {earlier}.event_sources IN ACCESS EXCLUSIVE MODE;
INSERT INTO {ledger}.event_sources (host, path)
SELECT host, path FROM {earlier}.event_sources
ON CONFLICT (host, path) DO NOTHING;
INSERT INTO {ledger}.event_receipts (event_id, row_id, source_id, byte_offset, captured_at, delivered_at, seen_again_at)
SELECT event_id, row_id, coalesce(s.id, 0), byte_offset, captured_at, delivered_at, seen_again_at
  FROM {earlier}.event_receipts AS r
  LEFT JOIN {earlier}.event_sources AS o ON o.id = r.source_id
  LEFT JOIN {ledger}.event_sources AS s ON s.host = o.host AND s.path = o.path
ON CONFLICT (event_id) DO NOTHING;
DROP TABLE {earlier}.event_receipts, {earlier}.event_sources;
