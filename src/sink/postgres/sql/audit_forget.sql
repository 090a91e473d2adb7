-- Removes receipts that lead to no row of their event, where that is still so. $1: the events' ids, $2: where the receipts lead,
-- $3: the events' types, $4: what their rows would say of their identity.
WITH gone AS (
  DELETE FROM {receipts} AS r USING unnest($1, $2, $3, $4) AS stale (event_id, row_id, event_type, identity)
   WHERE r.event_id = stale.event_id AND r.row_id = stale.row_id AND r.row_id <> {removed}
     AND NOT EXISTS (SELECT FROM {events}
                      WHERE id = r.row_id AND event_type = stale.event_type
                        AND (stale.identity IS NULL OR COALESCE({identity}, stale.identity) = stale.identity))
  RETURNING 1)
SELECT count(*) FROM gone
