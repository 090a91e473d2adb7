-- Makes durable what came before it on this connection, and tells of it: which of the events $1 were dealt with at the time $2, and
-- of $3 at the time $4; and whether they had been stored before. Nothing, if it wrote nothing.
WITH written AS (
       UPDATE {ledger}.event_sources SET path = path
        WHERE id = (SELECT id FROM {ledger}.event_sources LIMIT 1)
       RETURNING {flush})
SELECT event_id, seen_again_at IS NOT NULL
  FROM {ledger}.event_receipts, written
 WHERE event_id = ANY ($1) AND $2 IN (delivered_at, seen_again_at)
    OR event_id = $3 AND $4 IN (delivered_at, seen_again_at)
