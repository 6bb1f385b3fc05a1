-- name: commit
-- A durable commit that is found when it is sent again may not be on the synchronous standbys yet, if the server was
-- restarted while it waited for them. A message in the log makes this transaction wait for them.
SELECT {schema}.commit(
    %(attempt)s::bigint, %(is_repeated)s, %(is_durable)s, %(by)s, %(seen)s::bigint,
    %(commits)s::uuid[], %(events)b::bytea[], %(sizes)s::bigint[],
    %(writers)s::bigint[], %(kinds)s::text[], %(ids)s::text[], %(expected)s::bigint[],
    %(ttls)s::double precision[], %(values)b::bytea[],
    %(guarded)s::bigint[], %(guard_kinds)s::text[], %(guard_ids)s::text[], %(epochs)s::numeric[]
), CASE WHEN %(is_repeated)s AND %(is_durable)s THEN concat(
    CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')
        THEN set_config('synchronous_commit', 'on', true) END,
    pg_logical_emit_message(true, 'council', '')
) END

-- name: get
SELECT kind, id, version, value, position, time, by, expires FROM {schema}.documents
WHERE kind = %(kind)s AND id = %(id)s AND {schema}.document_exists(value, expires, {schema}.server_time())

-- name: list
SELECT kind, id, version, value, position, time, by, expires FROM {schema}.documents
WHERE kind = %(kind)s AND id LIKE %(pattern)s AND {schema}.document_exists(value, expires, {schema}.server_time())
ORDER BY id

-- name: head
SELECT position, first, bytes FROM {schema}.head WHERE is_only

-- name: records
SELECT first, position, time, by, events, kind, id, version, previous, expires, value
FROM {schema}.records(%(after)s, %(limit)s)

-- name: history
SELECT h.version, h.position, l.time, l.by, h.value, l.events
FROM {schema}.history h JOIN {schema}.log l USING (position)
WHERE h.kind = %(kind)s AND h.id = %(id)s
ORDER BY h.version DESC LIMIT %(limit)s

-- name: time_at
SELECT time FROM {schema}.log WHERE position <= %(position)s ORDER BY position DESC LIMIT 1

-- name: state_at
SELECT DISTINCT ON (h.kind, h.id) h.kind, h.id, h.version, h.value, h.position, l.time, l.by, h.expires
FROM {schema}.history h JOIN {schema}.log l USING (position)
WHERE h.position <= %(position)s
ORDER BY h.kind, h.id, h.version DESC

-- name: dump
SELECT l.position, l.time, l.by, l.events, h.kind, h.id, h.version, h.previous, h.expires, h.value
FROM {schema}.log l LEFT JOIN {schema}.history h USING (position)
WHERE l.position <= %(position)s
ORDER BY l.position, h.number

-- name: compact
SELECT bytes_before, bytes_after, first_position
FROM {schema}.compact(%(older_than)s::double precision, %(largest)s::double precision, %(versions)s::bigint)

-- name: totals
SELECT count(*), coalesce(sum(octet_length(value)), 0) FROM {schema}.documents
WHERE {schema}.document_exists(value, expires, {schema}.server_time())

-- name: large
SELECT kind, id, octet_length(value) FROM {schema}.documents
WHERE octet_length(value) > %(bytes)s AND {schema}.document_exists(value, expires, {schema}.server_time())
ORDER BY octet_length(value) DESC, kind, id

-- name: expired
SELECT kind, id FROM {schema}.documents
WHERE value IS NOT NULL AND expires <= {schema}.server_time() ORDER BY kind, id

-- name: connections
SELECT sum(numbackends)::bigint FROM pg_stat_database

-- name: replicas
SELECT coalesce(nullif(application_name, ''), host(client_addr), pid::text), coalesce(state, 'in an unknown state'),
    coalesce(sync_state IN ('sync', 'quorum'), false), pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn)::bigint,
    extract(epoch FROM flush_lag)::double precision
FROM pg_stat_replication WHERE state IS DISTINCT FROM 'backup' ORDER BY 1

-- name: damaged_versions
SELECT kind, id, version, position FROM {schema}.history
WHERE checksum <> {schema}.version_checksum(kind, id, version, position, expires, value)
ORDER BY position, number

-- name: damaged_commits
SELECT position FROM {schema}.log
WHERE checksum <> {schema}.checksum(concat_ws(E'\x1f', position, time, by), events)
ORDER BY position

-- name: missing_commits
SELECT l.previous + 1, l.position - 1 FROM (
    SELECT positions.position, greatest(lag(positions.position) OVER (ORDER BY positions.position), e.first) AS previous
    FROM (SELECT position FROM {schema}.log UNION ALL SELECT position + 1 FROM {schema}.head WHERE is_only) positions
    CROSS JOIN {schema}.head e WHERE positions.position > e.first
) l WHERE l.position > l.previous + 1

-- name: differing_documents
SELECT coalesce(d.kind, h.kind), coalesce(d.id, h.id)
FROM {schema}.documents d FULL JOIN (
    SELECT DISTINCT ON (kind, id) kind, id, version, position, expires, value FROM {schema}.history
    ORDER BY kind, id, version DESC
) h ON h.kind = d.kind AND h.id = d.id
WHERE (d.version, d.position, d.expires, d.value) IS DISTINCT FROM (h.version, h.position, h.expires, h.value)
    OR d.checksum <> {schema}.version_checksum(d.kind, d.id, d.version, d.position, d.expires, d.value)
ORDER BY 1, 2

-- name: lock_empty
SELECT pg_try_advisory_xact_lock('{schema}.head'::regclass::oid::bigint), position FROM {schema}.head

-- name: install
INSERT INTO {schema}.documents
SELECT DISTINCT ON (h.kind, h.id) h.kind, h.id, h.version, h.position, l.time, l.by, h.expires, h.value, h.checksum
FROM {schema}.history h JOIN {schema}.log l USING (position)
ORDER BY h.kind, h.id, h.version DESC

-- name: end_load
UPDATE {schema}.head SET position = %(position)s, first = %(first)s,
    bytes = (SELECT coalesce(sum(bytes), 0) FROM {schema}.log)

-- name: load_commits
INSERT INTO {schema}.log
SELECT position, gen_random_uuid(), time, by, events, bytes,
    {schema}.checksum(concat_ws(E'\x1f', position, time, by), events)
FROM unnest(
    %(positions)s::bigint[], %(times)s::double precision[], %(by)s::text[], %(events)b::bytea[], %(bytes)s::bigint[]
) AS c (position, time, by, events, bytes)

-- name: load_versions
INSERT INTO {schema}.history
SELECT kind, id, version, position, number, previous, expires, value,
    {schema}.version_checksum(kind, id, version, position, expires, value)
FROM unnest(
    %(kinds)s::text[], %(ids)s::text[], %(versions)s::bigint[], %(positions)s::bigint[], %(numbers)s::bigint[],
    %(previous)s::bigint[], %(expires)s::double precision[], %(values)b::bytea[]
) AS v (kind, id, version, position, number, previous, expires, value)

-- name: lock
SELECT pg_advisory_xact_lock('{schema}.head'::regclass::oid::bigint)

-- name: restart_log
UPDATE {schema}.head e SET first = greatest(
    e.first,
    (SELECT max(h.position) FROM {schema}.history h WHERE h.checksum
        <> {schema}.version_checksum(h.kind, h.id, h.version, h.position, h.expires, h.value)),
    (SELECT max(l.position) FROM {schema}.log l
        WHERE l.checksum <> {schema}.checksum(concat_ws(E'\x1f', l.position, l.time, l.by), l.events)),
    (SELECT max(l.position) - 1 FROM {schema}.log l WHERE l.position > e.first + 1
        AND NOT EXISTS (SELECT FROM {schema}.log before WHERE before.position = l.position - 1)),
    (SELECT e.position WHERE NOT EXISTS (SELECT FROM {schema}.log l WHERE l.position = e.position))
)

-- name: remove_damaged_commits
DELETE FROM {schema}.log
WHERE checksum <> {schema}.checksum(concat_ws(E'\x1f', position, time, by), events)

-- name: remove_damaged_versions
DELETE FROM {schema}.history h
WHERE h.checksum <> {schema}.version_checksum(h.kind, h.id, h.version, h.position, h.expires, h.value)
    OR NOT EXISTS (SELECT FROM {schema}.log l WHERE l.position = h.position)

-- name: restore_document
WITH known AS (
    SELECT version, value, expires FROM {schema}.documents d WHERE kind = %(kind)s AND id = %(id)s
        AND checksum = {schema}.version_checksum(kind, id, version, position, expires, value)
    UNION ALL SELECT version, value, expires FROM {schema}.history WHERE kind = %(kind)s AND id = %(id)s
), newest AS (
    SELECT value, expires FROM known ORDER BY version DESC LIMIT 1
)
INSERT INTO {schema}.documents AS d
SELECT %(kind)s, %(id)s, greatest(
        (SELECT version FROM {schema}.documents WHERE kind = %(kind)s AND id = %(id)s),
        (SELECT max(version) FROM {schema}.history WHERE kind = %(kind)s AND id = %(id)s)
    ), e.position, {schema}.server_time(), '', newest.expires, newest.value, ''
FROM {schema}.head e LEFT JOIN newest ON true
ON CONFLICT (kind, id) DO UPDATE SET
    version = excluded.version, position = excluded.position, time = excluded.time, by = excluded.by,
    expires = excluded.expires, value = excluded.value, checksum = excluded.checksum
RETURNING d.version, d.value, d.expires - {schema}.server_time()
