-- For other programs: the state, its history and the checkpoints.
CREATE VIEW {schema}.agent_state AS
SELECT id AS agent_id, kind AS state_type, {schema}.readable(value) AS state_data, version, position,
    to_timestamp(time) AS updated_at, by AS updated_by, to_timestamp(expires) AS expires_at
FROM {schema}.documents
WHERE {schema}.document_exists(value, expires, {schema}.server_time());

CREATE VIEW {schema}.state_history AS
SELECT h.id AS agent_id, h.kind AS state_type, {schema}.readable(old.value) AS old_data,
    {schema}.readable(h.value) AS new_data,
    CASE WHEN h.value IS NULL THEN 'delete' WHEN old.value IS NULL THEN 'create' ELSE 'update' END AS change_type,
    h.version, h.position, l.by AS changed_by, to_timestamp(l.time) AS timestamp
FROM {schema}.history h JOIN {schema}.log l USING (position)
LEFT JOIN {schema}.history old ON old.kind = h.kind AND old.id = h.id AND old.version = h.version - 1;

CREATE VIEW {schema}.workflow_checkpoints AS
SELECT id, split_part(id, '/', 1) AS workflow_id, {schema}.readable(value) AS checkpoint_data, version,
    to_timestamp(time) AS created_at, by AS created_by
FROM {schema}.documents
WHERE kind = 'checkpoint' AND {schema}.document_exists(value, expires, {schema}.server_time());

CREATE VIEW {schema}.leases AS
SELECT kind, id, {schema}.readable(value) ->> 'epoch' AS epoch, to_timestamp(expires) AS expires_at, by AS held_by
FROM {schema}.documents
WHERE kind = 'lease' AND {schema}.document_exists(value, expires, {schema}.server_time());
