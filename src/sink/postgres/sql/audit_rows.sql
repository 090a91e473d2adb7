-- The next rows in their order, with what they say of their own identity. $1: the id before them.
SELECT id::bigint, event_type::text, CASE WHEN event_type IN ('turn_detected', 'session_registered') THEN {identity} END
  FROM {events} WHERE id > $1 ORDER BY id LIMIT 5000
