-- The program's own tables. Every statement leaves alone what is already there.

-- One receipt for each stored event, written in the same transaction as its row: it refuses a second copy.
CREATE TABLE IF NOT EXISTS {ledger}.event_receipts (
    event_id      uuid PRIMARY KEY,
    row_id        bigint NOT NULL,      -- id of the event's row; 0: removed on purpose
    source_id     bigint NOT NULL,      -- event_sources.id
    byte_offset   bigint,               -- of the line in its transcript
    captured_at   timestamptz NOT NULL, -- when it was accepted into the local queue
    delivered_at  timestamptz NOT NULL, -- when it was sent here
    seen_again_at timestamptz           -- when the same event was last sent again, and not stored again
);
CREATE TABLE IF NOT EXISTS {ledger}.event_sources (
    id   bigserial PRIMARY KEY,
    host text NOT NULL,
    path text NOT NULL,                 -- of the transcript; else hook, http or cli
    UNIQUE (host, path)
);
