-- What `check` wants to know. $1: the events table, $2: its schema or null, $3: the ledger's schema, $4: the routines.
WITH events AS (SELECT oid, relnamespace FROM pg_class WHERE oid = to_regclass($1)),
     ledger AS (SELECT to_regnamespace(quote_ident($3))::oid AS schema,
                       to_regclass(quote_ident($3) || '.event_receipts')::oid AS receipts,
                       to_regclass(quote_ident($3) || '.event_sources')::oid AS sources)
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int AS version_number,
       ARRAY(SELECT needed.privilege || ' on ' || needed.relid::regclass::text
               FROM ledger LEFT JOIN events ON true
              CROSS JOIN LATERAL (VALUES (events.oid, 'INSERT'), (receipts, 'INSERT'), (receipts, 'SELECT'),
                     (receipts, 'UPDATE'), (sources, 'INSERT'), (sources, 'SELECT'), (sources, 'UPDATE')
                    ) AS needed(relid, privilege)
              WHERE needed.relid IS NOT NULL AND NOT has_table_privilege(needed.relid, needed.privilege)
             UNION ALL
             SELECT 'USAGE on ' || counter.name
               FROM ledger LEFT JOIN events ON true
              CROSS JOIN LATERAL (VALUES (pg_get_serial_sequence(events.oid::regclass::text, 'id')),
                     (pg_get_serial_sequence(sources::regclass::text, 'id'))) AS counter(name)
              WHERE counter.name IS NOT NULL AND NOT has_sequence_privilege(counter.name, 'USAGE, UPDATE')
             UNION ALL
             SELECT 'EXECUTE on ' || p.oid::regproc::text FROM pg_proc p, ledger
              WHERE p.pronamespace = ledger.schema AND p.proname = ANY ($4)
                AND NOT has_function_privilege(p.oid, 'EXECUTE')) AS lacks,
       coalesce((SELECT CASE WHEN schema IS NULL THEN has_database_privilege(current_database(), 'CREATE')
                             ELSE has_schema_privilege(schema, 'CREATE') END FROM ledger), false)
         AND (EXISTS (SELECT FROM events) OR coalesce(has_schema_privilege(
                CASE WHEN $2 IS NULL THEN to_regnamespace(current_schema()::text)::oid
                     ELSE to_regnamespace(quote_ident($2))::oid END, 'CREATE'), false)) AS may_create,
       current_setting('transaction_read_only') = 'on' AS is_read_only,
       $2 IS NOT NULL AND to_regnamespace(quote_ident($2)) IS NULL AS schema_missing,
       current_setting('server_encoding') AS encoding,
       to_regclass('pg_dist_placement') IS NOT NULL AS has_citus,
       -- Bits of tgtype: 1 for each row, 2 before, 4 insert.
       ARRAY(SELECT tgname::text FROM pg_trigger, events
              WHERE tgrelid = events.oid AND NOT tgisinternal AND tgenabled IN ('O', 'A') AND tgtype & 7 = 7) AS triggers
