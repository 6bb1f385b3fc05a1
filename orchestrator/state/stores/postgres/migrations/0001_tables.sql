-- One row: the end of the log, the position from which history is complete, and the size of the log.
CREATE TABLE {schema}.head (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    position bigint NOT NULL DEFAULT 0,
    first bigint NOT NULL DEFAULT 0,
    bytes bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 10);
INSERT INTO {schema}.head DEFAULT VALUES;

-- A row for each commit. `events` is encoded as JSON, which may contain what jsonb cannot.
CREATE TABLE {schema}.log (
    position bigint PRIMARY KEY,
    id uuid NOT NULL UNIQUE,
    time double precision NOT NULL,
    by text NOT NULL,
    events bytea NOT NULL,
    bytes bigint NOT NULL,
    checksum bytea NOT NULL
);

-- The versions of documents; `number` orders those of a commit. A deletion has no value.
CREATE TABLE {schema}.history (
    kind text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    version bigint NOT NULL,
    position bigint NOT NULL,
    number bigint NOT NULL,
    previous bigint NOT NULL,
    expires double precision,
    value bytea,
    checksum bytea NOT NULL,
    PRIMARY KEY (kind, id, version),
    UNIQUE (position, number)
);

-- The newest version of each document, including deleted ones.
CREATE TABLE {schema}.documents (
    kind text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    version bigint NOT NULL,
    position bigint NOT NULL,
    time double precision NOT NULL,
    by text NOT NULL,
    expires double precision,
    value bytea,
    checksum bytea NOT NULL,
    PRIMARY KEY (kind, id)
) WITH (fillfactor = 70);

-- Ids of commits whose reply may have been lost. Rejected ones have no position: an earlier attempt to send such a
-- commit that arrives late must not apply it. Applied ones are here once their row of the log is pruned.
CREATE TABLE {schema}.settled (
    id uuid PRIMARY KEY,
    attempt bigint NOT NULL,
    position bigint,
    time double precision NOT NULL
);
