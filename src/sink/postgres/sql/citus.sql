-- Where Citus keeps the events, when that is one other node. $1: the events table.
SELECT min(node.nodename || ':' || node.nodeport)
  FROM pg_dist_shard JOIN pg_dist_placement USING (shardid) JOIN pg_dist_node AS node USING (groupid)
 WHERE logicalrelid = to_regclass($1) AND node.noderole = 'primary'
HAVING count(*) = 1 AND min(groupid) <> (SELECT groupid FROM pg_dist_local_group)
