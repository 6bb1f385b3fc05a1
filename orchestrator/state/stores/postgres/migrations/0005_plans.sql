-- A function keeps the plans of its statements for the time of a connection, also behind a pooler, which forgets prepared
-- statements. Only plans that do not depend on the parameters are kept.
ALTER FUNCTION {schema}.commit(
    bigint, boolean, boolean, text, bigint, uuid[], bytea[], bigint[], bigint[], text[], text[], bigint[],
    double precision[], bytea[], bigint[], text[], text[], numeric[]
) SET plan_cache_mode = force_generic_plan;

-- The commits after a position for watchers, with a row for each document, and the position from which history is
-- complete. The range of the second join repeats that of the first, so that no plan reads the whole history.
CREATE FUNCTION {schema}.records(_after bigint, _limit bigint) RETURNS TABLE (
    first bigint, "position" bigint, "time" double precision, by text, events bytea,
    kind text, id text, version bigint, previous bigint, expires double precision, "value" bytea
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    RETURN QUERY
    SELECT e.first, l.position, l.time, l.by, l.events, h.kind, h.id, h.version, h.previous, h.expires, h.value
    FROM {schema}.head e
    LEFT JOIN {schema}.log l ON l.position > _after AND l.position <= _after + _limit
    LEFT JOIN {schema}.history h ON h.position = l.position AND h.position > _after AND h.position <= _after + _limit
    WHERE e.is_only
    ORDER BY l.position, h.number;
END $$;

-- The functions that they call are expanded, instead of planned with each statement, only if they are not declared more
-- constant than the conversions in them.
ALTER FUNCTION {schema}.checksum(text, bytea) STABLE;
ALTER FUNCTION {schema}.readable(bytea) STABLE;

-- Values of up to 8 kB are not compressed: each commit would compress them twice, and each watcher decompress them.
ALTER TABLE {schema}.history SET (toast_tuple_target = 8160);
ALTER TABLE {schema}.documents SET (toast_tuple_target = 8160);
