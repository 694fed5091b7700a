-- What all merchants share: who they are, where their databases are, and the commands of credits.control.

CREATE TABLE merchants (
    merchant_id text PRIMARY KEY,
    state text NOT NULL CHECK (state IN ('provisioning', 'active', 'suspended')),
    database_url text NOT NULL,  -- without a password
    password text NOT NULL,
    secret bytea NOT NULL,       -- keys account ids, fingerprints and field digests
    partitions integer NOT NULL,
    simulated boolean NOT NULL,
    command bytea NOT NULL,
    fingerprint bytea NOT NULL,
    registered_at timestamptz NOT NULL
);

CREATE TABLE secrets (
    name text PRIMARY KEY,
    value bytea NOT NULL
);

CREATE TABLE tokens (
    token_id text PRIMARY KEY,
    sha256 bytea NOT NULL UNIQUE,
    role text NOT NULL CHECK (role IN ('user', 'support', 'admin', 'upstream', 'auditor', 'metrics')),
    merchant_id text,
    subject text,
    note text,
    created_at timestamptz NOT NULL,
    revoked_at timestamptz
);

CREATE TABLE inbox (
    identity bytea PRIMARY KEY,
    fingerprint bytea NOT NULL,
    digests bytea NOT NULL,
    business_key bytea,
    type text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    kafka_offset bigint NOT NULL,
    encoding smallint NOT NULL,
    account_id bigint,
    actor text,
    outcome text,
    code text,
    decided_at timestamptz,
    result text,
    released bytea
);
CREATE UNIQUE INDEX inbox_business_key ON inbox (business_key) WHERE business_key IS NOT NULL;

CREATE TABLE dead_letters (
    topic text NOT NULL,
    partition integer NOT NULL,
    kafka_offset bigint NOT NULL,
    sha256 bytea NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    noted_at timestamptz NOT NULL,
    redriven_at timestamptz,
    PRIMARY KEY (topic, partition, kafka_offset)
);

CREATE TABLE positions (
    topic text NOT NULL,
    partition integer NOT NULL,
    owner text NOT NULL,
    generation bigint NOT NULL,
    applied_next bigint NOT NULL,
    published_next bigint NOT NULL CHECK (published_next <= applied_next),
    PRIMARY KEY (topic, partition)
);
