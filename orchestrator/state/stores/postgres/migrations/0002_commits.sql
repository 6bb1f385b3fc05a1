CREATE FUNCTION {schema}.server_time() RETURNS double precision LANGUAGE sql VOLATILE AS $$
    SELECT extract(epoch FROM clock_timestamp())::double precision
$$;

CREATE FUNCTION {schema}.checksum(_fields text, _content bytea) RETURNS bytea LANGUAGE sql IMMUTABLE AS $$
    SELECT substr(sha256(convert_to(_fields, 'UTF8') || coalesce(_content, ''::bytea)), 1, 8)
$$;

CREATE FUNCTION {schema}.version_checksum(
    _kind text, _id text, _version bigint, _position bigint, _expires double precision, _value bytea
) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT {schema}.checksum(
        concat_ws(E'\x1f', _kind, _id, _version, _position, coalesce(_expires::text, '-'), _value IS NULL), _value)
$$;

-- The value of a document for queries: jsonb cannot contain \u0000, which becomes \u0001.
CREATE FUNCTION {schema}.readable(_value bytea) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT replace(convert_from(_value, 'UTF8'), '\u0000', '\u0001')::jsonb
$$;

CREATE FUNCTION {schema}.document_exists(_value bytea, _expires double precision, _now double precision)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT _value IS NOT NULL AND (_expires IS NULL OR _now < _expires)
$$;

-- Prune commits, and return the size of the log before and after, and its first position. Another process that
-- prunes at the same time does it all. The newest commit is kept.
CREATE FUNCTION {schema}.compact(_older_than double precision, _largest double precision, _versions bigint)
RETURNS TABLE (bytes_before bigint, bytes_after bigint, first_position bigint) LANGUAGE plpgsql AS $$
DECLARE
    _cut bigint;
    _before bigint;
    _removed bigint;
BEGIN
    SELECT h.bytes INTO _before FROM {schema}.head h;
    IF pg_try_advisory_xact_lock('{schema}.log'::regclass::oid::bigint) THEN
        -- Without the zero, nothing to prune would be NULL, which least() ignores: it would prune everything.
        SELECT greatest(h.first, least(h.position - 1, greatest(
            0,
            (SELECT l.position FROM {schema}.log l WHERE l.time < _older_than ORDER BY l.position DESC LIMIT 1),
            (SELECT kept.position FROM (
                SELECT l.position, sum(l.bytes) OVER (ORDER BY l.position DESC) AS bytes FROM {schema}.log l
            ) kept WHERE kept.bytes > _largest ORDER BY kept.position DESC LIMIT 1)
        ))) INTO _cut FROM {schema}.head h;
        IF _cut > 0 THEN
            SELECT coalesce(sum(l.bytes), 0) INTO _removed FROM {schema}.log l WHERE l.position <= _cut;
            DELETE FROM {schema}.history h USING (
                SELECT kind, id, version, row_number() OVER newest_first AS age,
                    first_value(value IS NULL) OVER newest_first AS is_deleted
                FROM {schema}.history WHERE position <= _cut
                WINDOW newest_first AS (PARTITION BY kind, id ORDER BY version DESC)
            ) old
            WHERE h.kind = old.kind AND h.id = old.id AND h.version = old.version
                AND old.age > CASE WHEN old.is_deleted THEN 1 ELSE _versions END;
            WITH gone AS (
                DELETE FROM {schema}.log l WHERE l.position <= _cut
                AND NOT EXISTS (SELECT FROM {schema}.history h WHERE h.position = l.position)
                RETURNING l.*
            )
            INSERT INTO {schema}.settled (id, attempt, position, time)
            SELECT g.id, 0, g.position, g.time FROM gone g
            WHERE g.time > {schema}.server_time() - 3600 ON CONFLICT (id) DO NOTHING;
            DELETE FROM {schema}.settled s WHERE s.time < {schema}.server_time() - 3600;
            UPDATE {schema}.log l SET bytes = remaining.bytes FROM (
                SELECT l.position, octet_length(l.events) + 100
                    + coalesce(sum(100 + coalesce(octet_length(h.value), 0)), 0) AS bytes
                FROM {schema}.log l JOIN {schema}.history h USING (position)
                WHERE l.position <= _cut GROUP BY l.position
            ) remaining WHERE l.position = remaining.position AND l.bytes <> remaining.bytes;
            UPDATE {schema}.head SET first = _cut, bytes = bytes - _removed
                + (SELECT coalesce(sum(l.bytes), 0) FROM {schema}.log l WHERE l.position <= _cut);
        END IF;
    END IF;
    RETURN QUERY SELECT _before, h.bytes, h.first FROM {schema}.head h;
END $$;
