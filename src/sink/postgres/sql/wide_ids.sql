-- An earlier version made them integers.
ALTER TABLE {ledger}.event_sources ALTER COLUMN id TYPE bigint;
ALTER SEQUENCE IF EXISTS {ledger}.event_sources_id_seq AS bigint;
ALTER TABLE {ledger}.event_receipts ALTER COLUMN source_id TYPE bigint;
