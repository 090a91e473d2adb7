-- What stands in the database. $1: the events table, $2: its schema or null, $3: the ledger's schema.
WITH events AS (
       SELECT c.oid, n.nspname::text AS schema, pg_get_serial_sequence(c.oid::regclass::text, 'id') AS sequence
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass($1)),
     place AS (SELECT coalesce((SELECT schema FROM events), $2, current_schema()::text) AS schema),
     -- Tables with the columns that we use of them.
     known AS (
       SELECT asked.name, min(attrelid) AS oid
         FROM place
        CROSS JOIN LATERAL (VALUES
                ('projects', place.schema, 'projects', ARRAY['id', 'path']),
                ('agents', place.schema, 'agents', ARRAY['id', 'claude_session_id']),
                ('receipts', $3, 'event_receipts', ARRAY['event_id']),
                ('sources', $3, 'event_sources', ARRAY['id']),
                ('earlier receipts', nullif(place.schema, $3), 'event_receipts', ARRAY['event_id', 'row_id', 'source_id']),
                ('earlier sources', nullif(place.schema, $3), 'event_sources', ARRAY['id', 'host', 'path'])
              ) AS asked (name, schema, relation, columns)
         JOIN pg_attribute a ON a.attname = ANY (asked.columns)
          AND a.attrelid = to_regclass(quote_ident(asked.schema) || '.' || asked.relation)
         JOIN pg_class ON pg_class.oid = a.attrelid AND (relkind IN ('r', 'p') OR asked.name NOT LIKE 'earlier%')
        GROUP BY asked.name, asked.columns
       HAVING count(*) = cardinality(asked.columns))
SELECT EXISTS (SELECT FROM events) AS has_events,
       (SELECT schema FROM place) AS schema,
       (SELECT sequence FROM events) AS sequence,
       -- Asked for only where it is needed: it waits for a lock on the table.
       (SELECT CASE WHEN events.sequence IS NULL THEN pg_get_expr(d.adbin, d.adrelid) END FROM events
          JOIN pg_attrdef d ON d.adrelid = events.oid
          JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum AND a.attname = 'id') AS id_default,
       ARRAY(SELECT attname::text FROM events
               JOIN pg_attribute ON attrelid = events.oid AND attnum > 0 AND NOT attisdropped) AS columns,
       EXISTS (SELECT FROM known WHERE name = 'projects' AND has_table_privilege(oid, 'SELECT')) AS has_projects,
       EXISTS (SELECT FROM known WHERE name = 'agents' AND has_table_privilege(oid, 'SELECT')) AS has_agents,
       to_regnamespace(quote_ident($3)) IS NOT NULL AS has_schema,
       (SELECT count(*) = 2 FROM known WHERE name IN ('receipts', 'sources')) AS has_ledger,
       EXISTS (SELECT FROM known
                 JOIN pg_attribute ON attrelid = known.oid AND attname IN ('id', 'source_id') AND atttypid = 'integer'::regtype
                WHERE name IN ('receipts', 'sources')) AS has_narrow_ids,
       (SELECT count(*) = 2 FROM known WHERE name IN ('earlier receipts', 'earlier sources')) AS has_earlier_ledger,
       NOT EXISTS (SELECT FROM pg_class
                    WHERE relnamespace = to_regnamespace(quote_ident($3)) AND relname IN ('turns', 'sessions')
                      AND (relkind <> 'v' OR obj_description(oid, 'pg_class') NOT LIKE 'headspace-watcher: %'
                           OR obj_description(oid, 'pg_class') IS NULL)) AS has_room_for_views,
       ARRAY(SELECT proname::text FROM pg_proc WHERE pronamespace = to_regnamespace(quote_ident($3))) AS routines
