-- Who holds a lock that keeps an INSERT waiting. $1: the tables.
SELECT format('session %s (user %s, %s, %s for %s s) holds %s on %s: wait for it, or end it with pg_terminate_backend(%s)',
              a.pid, a.usename, coalesce(nullif(a.application_name, ''), 'unnamed'), coalesce(a.state, 'running'),
              round(extract(epoch FROM clock_timestamp() - coalesce(a.state_change, a.xact_start))), l.mode,
              l.relation::regclass, a.pid)
  FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.granted AND l.pid <> pg_backend_pid() AND l.relation = ANY (SELECT to_regclass(t) FROM unnest($1) AS t)
   AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
 ORDER BY a.xact_start LIMIT 1
