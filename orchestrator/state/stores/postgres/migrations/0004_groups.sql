-- Earlier versions called it once for each commit.
DROP FUNCTION IF EXISTS {schema}.commit(
    uuid, bigint, boolean, boolean, text, bigint, bytea, text[], text[], bigint[], double precision[], bytea[],
    text[], text[], numeric[]
);

-- Apply a group of commits, and return for each its position or why it is rejected. No commit of a group may write or
-- guard a document that an earlier one writes, so that all are checked and written together. The columns of writes and
-- guards are those of all commits, with the number of the commit. Groups take a lock until their end, so that a commit
-- becomes visible only after all commits with lower positions. The planner settings enforce lookups by index however
-- small a table is.
CREATE FUNCTION {schema}.commit(
    _attempt bigint, _is_repeated boolean, _is_durable boolean, _by text, _seen bigint,
    _commits uuid[], _events bytea[], _sizes bigint[],
    _writers bigint[], _kinds text[], _ids text[], _expected bigint[], _ttls double precision[], _values bytea[],
    _guarded bigint[], _guard_kinds text[], _guard_ids text[], _epochs numeric[]
) RETURNS jsonb[] LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    _end bigint;
    _time double precision;
    _size bigint := 0;
    _number bigint;
    _reply jsonb;
    _replies jsonb[];
    _positions bigint[] := array_fill(NULL::bigint, ARRAY[cardinality(_commits)]);
BEGIN
    PERFORM pg_advisory_xact_lock('{schema}.head'::regclass::oid::bigint);
    SELECT h.position, {schema}.server_time() INTO STRICT _end, _time FROM {schema}.head h WHERE h.is_only;
    IF _end < _seen THEN
        RETURN array_fill(jsonb_build_array('lost', _end), ARRAY[cardinality(_commits)]);
    END IF;
    SELECT array_agg(CASE
        WHEN s.attempt > _attempt THEN jsonb_build_array('late')
        WHEN l.position IS NOT NULL THEN jsonb_build_array('ok', l.position)
        WHEN _is_repeated AND s.position IS NOT NULL THEN jsonb_build_array('ok', s.position)
    END ORDER BY c.number) INTO _replies
    FROM unnest(_commits) WITH ORDINALITY AS c (id, number)
    LEFT JOIN {schema}.settled s ON s.id = c.id
    LEFT JOIN {schema}.log l ON _is_repeated AND l.id = c.id;

    FOR _number, _reply IN
        SELECT DISTINCT ON (failed.number) failed.number, failed.reply FROM (
            SELECT g.of AS number, false AS is_write, g.number AS which,
                jsonb_build_array('lease', g.number, found.epoch) AS reply
            FROM unnest(_guarded, _guard_kinds, _guard_ids, _epochs)
                WITH ORDINALITY AS g (of, kind, id, epoch, number)
            LEFT JOIN {schema}.documents d ON d.kind = g.kind AND d.id = g.id
                AND {schema}.document_exists(d.value, d.expires, _time)
            LEFT JOIN LATERAL (SELECT {schema}.readable(d.value) -> 'epoch' AS epoch) found ON true
            WHERE CASE jsonb_typeof(found.epoch) WHEN 'number' THEN found.epoch::numeric <> g.epoch ELSE true END
            UNION ALL
            SELECT w.of, true, w.number,
                jsonb_build_array('conflict', w.number, found.version, coalesce(d.by, ''), coalesce(d.time, 0))
            FROM unnest(_writers, _kinds, _ids, _expected) WITH ORDINALITY AS w (of, kind, id, expected, number)
            LEFT JOIN {schema}.documents d ON d.kind = w.kind AND d.id = w.id
            CROSS JOIN LATERAL (
                SELECT CASE WHEN {schema}.document_exists(d.value, d.expires, _time) THEN d.version ELSE 0 END AS version
            ) found
            WHERE w.expected <> found.version
        ) failed
        WHERE _replies[failed.number] IS NULL
        ORDER BY failed.number, failed.is_write, failed.which
    LOOP
        _replies[_number] := _reply;
        IF _is_repeated THEN
            INSERT INTO {schema}.settled AS s (id, attempt, time) VALUES (_commits[_number], _attempt, _time)
            ON CONFLICT (id) DO UPDATE SET attempt = greatest(s.attempt, excluded.attempt);
        END IF;
    END LOOP;
    FOR _number IN 1..cardinality(_commits) LOOP
        IF _replies[_number] IS NULL THEN
            _end := _end + 1;
            _size := _size + _sizes[_number];
            _positions[_number] := _end;
            _replies[_number] := jsonb_build_array('ok', _end);
        END IF;
    END LOOP;
    IF _size = 0 THEN
        RETURN _replies;
    END IF;

    -- A durable commit is on disk, and on the synchronous standbys if there are any, when it is acknowledged; the
    -- others need only the disk.
    IF NOT _is_durable THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    ELSIF current_setting('synchronous_commit') IN ('off', 'local', 'remote_write') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    INSERT INTO {schema}.log
    SELECT c.position, c.id, _time, _by, c.events, c.size,
        {schema}.checksum(concat_ws(E'\x1f', c.position, _time, _by), c.events)
    FROM unnest(_positions, _commits, _events, _sizes) AS c (position, id, events, size)
    WHERE c.position IS NOT NULL;
    IF cardinality(_kinds) > 0 THEN
        WITH written AS (
            INSERT INTO {schema}.history AS h
            SELECT w.kind, w.id, next.version, next.position, w.number, coalesce(d.position, 0), next.expires, w.value,
                {schema}.version_checksum(w.kind, w.id, next.version, next.position, next.expires, w.value)
            FROM unnest(_writers, _kinds, _ids, _ttls, _values)
                WITH ORDINALITY AS w (of, kind, id, ttl, value, number)
            LEFT JOIN {schema}.documents d ON d.kind = w.kind AND d.id = w.id
            CROSS JOIN LATERAL (
                SELECT coalesce(d.version, 0) + 1 AS version, _time + w.ttl AS expires, _positions[w.of] AS position
            ) next
            WHERE next.position IS NOT NULL
            RETURNING h.*
        )
        INSERT INTO {schema}.documents AS d
        SELECT w.kind, w.id, w.version, w.position, _time, _by, w.expires, w.value, w.checksum FROM written w
        ON CONFLICT (kind, id) DO UPDATE SET
            version = excluded.version, position = excluded.position, time = excluded.time, by = excluded.by,
            expires = excluded.expires, value = excluded.value, checksum = excluded.checksum;
    END IF;
    UPDATE {schema}.head SET position = _end, bytes = bytes + _size WHERE is_only;
    PERFORM pg_notify('{channel}', '');
    RETURN _replies;
END $$;
