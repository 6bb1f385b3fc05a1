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

-- Apply a commit, or return why it is rejected. Commits take a lock until their end, so that a commit becomes visible
-- only after all commits with lower positions. The planner settings enforce lookups by index however small a table is.
CREATE FUNCTION {schema}.commit(
    _id uuid, _attempt bigint, _is_repeated boolean, _is_durable boolean, _by text, _seen bigint, _events bytea,
    _kinds text[], _ids text[], _expected bigint[], _ttls double precision[], _values bytea[],
    _guard_kinds text[], _guard_ids text[], _epochs numeric[]
) RETURNS jsonb LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    _position bigint;
    _time double precision;
    _size bigint;
    _reply jsonb;
BEGIN
    PERFORM pg_advisory_xact_lock('{schema}.head'::regclass::oid::bigint);
    SELECT h.position, {schema}.server_time() INTO STRICT _position, _time FROM {schema}.head h WHERE h.is_only;
    IF _position < _seen THEN
        RETURN jsonb_build_array('lost', _position);
    END IF;
    IF EXISTS (SELECT FROM {schema}.settled s WHERE s.id = _id AND s.attempt > _attempt) THEN
        RETURN jsonb_build_array('late');
    END IF;
    IF _is_repeated THEN
        SELECT jsonb_build_array('ok', found.position) INTO _reply FROM (
            SELECT l.position FROM {schema}.log l WHERE l.id = _id
            UNION ALL SELECT s.position FROM {schema}.settled s WHERE s.id = _id AND s.position IS NOT NULL
        ) found LIMIT 1;
        IF FOUND THEN
            RETURN _reply;
        END IF;
    END IF;

    IF cardinality(_guard_kinds) > 0 THEN
        SELECT jsonb_build_array('lease', g.number, found.epoch) INTO _reply
        FROM unnest(_guard_kinds, _guard_ids, _epochs) WITH ORDINALITY AS g (kind, id, epoch, number)
        LEFT JOIN {schema}.documents d ON d.kind = g.kind AND d.id = g.id
            AND {schema}.document_exists(d.value, d.expires, _time)
        LEFT JOIN LATERAL (SELECT {schema}.readable(d.value) -> 'epoch' AS epoch) found ON true
        WHERE CASE jsonb_typeof(found.epoch) WHEN 'number' THEN found.epoch::numeric <> g.epoch ELSE true END
        ORDER BY g.number LIMIT 1;
    END IF;
    IF _reply IS NULL AND cardinality(_kinds) > 0 THEN
        SELECT jsonb_build_array('conflict', w.number, found.version, coalesce(d.by, ''), coalesce(d.time, 0))
        INTO _reply
        FROM unnest(_kinds, _ids, _expected) WITH ORDINALITY AS w (kind, id, expected, number)
        LEFT JOIN {schema}.documents d ON d.kind = w.kind AND d.id = w.id
        CROSS JOIN LATERAL (
            SELECT CASE WHEN {schema}.document_exists(d.value, d.expires, _time) THEN d.version ELSE 0 END AS version
        ) found
        WHERE w.expected <> found.version
        ORDER BY w.number LIMIT 1;
    END IF;
    IF _reply IS NOT NULL THEN
        IF _is_repeated THEN
            INSERT INTO {schema}.settled AS s (id, attempt, time) VALUES (_id, _attempt, _time)
            ON CONFLICT (id) DO UPDATE SET attempt = greatest(s.attempt, excluded.attempt);
        END IF;
        RETURN _reply;
    END IF;

    -- A durable commit is on disk, and on the synchronous standbys if there are any, when it is acknowledged; the
    -- others need only the disk.
    IF NOT _is_durable THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    ELSIF current_setting('synchronous_commit') IN ('off', 'local', 'remote_write') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    _position := _position + 1;
    SELECT octet_length(_events) + 100 + coalesce(sum(100 + coalesce(octet_length(value), 0)), 0) INTO _size
    FROM unnest(_values) AS value;
    INSERT INTO {schema}.log VALUES (
        _position, _id, _time, _by, _events, _size,
        {schema}.checksum(concat_ws(E'\x1f', _position, _time, _by), _events)
    );
    IF cardinality(_kinds) > 0 THEN
        WITH written AS (
            INSERT INTO {schema}.history AS h
            SELECT w.kind, w.id, next.version, _position, w.number, coalesce(d.position, 0), next.expires, w.value,
                {schema}.version_checksum(w.kind, w.id, next.version, _position, next.expires, w.value)
            FROM unnest(_kinds, _ids, _ttls, _values) WITH ORDINALITY AS w (kind, id, ttl, value, number)
            LEFT JOIN {schema}.documents d ON d.kind = w.kind AND d.id = w.id
            CROSS JOIN LATERAL (SELECT coalesce(d.version, 0) + 1 AS version, _time + w.ttl AS expires) next
            RETURNING h.*
        )
        INSERT INTO {schema}.documents AS d
        SELECT w.kind, w.id, w.version, w.position, _time, _by, w.expires, w.value, w.checksum FROM written w
        ON CONFLICT (kind, id) DO UPDATE SET
            version = excluded.version, position = excluded.position, time = excluded.time, by = excluded.by,
            expires = excluded.expires, value = excluded.value, checksum = excluded.checksum;
    END IF;
    UPDATE {schema}.head SET position = _position, bytes = bytes + _size WHERE is_only;
    PERFORM pg_notify('{channel}', '');
    RETURN jsonb_build_array('ok', _position);
END $$;

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
