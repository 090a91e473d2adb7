-- The id of a source, which is made where it is new.
CREATE OR REPLACE FUNCTION {ledger}.{source}(_host text, _path text) RETURNS bigint LANGUAGE plpgsql AS $source$
DECLARE
  _id bigint;
BEGIN
  SELECT id INTO _id FROM {ledger}.event_sources WHERE host = _host AND path = _path;
  IF NOT FOUND THEN
    INSERT INTO {ledger}.event_sources AS s (host, path) VALUES (_host, _path)
    ON CONFLICT (host, path) DO UPDATE SET path = s.path RETURNING id INTO _id;
  END IF;
  RETURN _id;
END
$source$
