-- The receipts of events and the rows that they lead to. $1: the events' ids.
-- OFFSET 0 keeps the planner from joining whole tables: each is looked up by its primary key, also where nobody has analyzed
-- the tables yet.
SELECT r.event_id, r.row_id, e.event_type, e.identity
  FROM unnest($1) AS asked (id)
 CROSS JOIN LATERAL (SELECT event_id, row_id FROM {receipts} WHERE event_id = asked.id OFFSET 0) AS r
  LEFT JOIN LATERAL (SELECT event_type::text, {identity} AS identity FROM {events} WHERE id = r.row_id OFFSET 0) AS e ON true
