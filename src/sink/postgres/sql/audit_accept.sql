-- Notes that rows were removed on purpose. $1: the events' ids, $2: where their receipts led.
WITH accepted AS (UPDATE {receipts} AS r SET row_id = {removed} FROM unnest($1, $2) AS gone (event_id, row_id)
                   WHERE r.event_id = gone.event_id AND r.row_id = gone.row_id RETURNING r.event_id)
SELECT event_id FROM accepted
