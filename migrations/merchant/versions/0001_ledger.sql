-- A merchant's whole database. Owned by the service's admin role; merchants' roles are members of credits_worker
-- and can do no more than what is granted here.

-- Ranges of text give exclusion constraints an equality that works in GiST without any extension.
CREATE TYPE textrange AS RANGE (subtype = text, collation = "C");

CREATE TABLE merchant_state (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    merchant_id text,
    config_version bigint NOT NULL DEFAULT 0,
    catalog_version bigint NOT NULL DEFAULT 0,
    clock_offset interval NOT NULL DEFAULT '0',
    suspended boolean NOT NULL DEFAULT false
);
INSERT INTO merchant_state DEFAULT VALUES;

CREATE TABLE merchant_config (
    version bigint PRIMARY KEY,
    config jsonb NOT NULL,
    actor text NOT NULL,
    command bytea NOT NULL,
    applied_at timestamptz NOT NULL
);

-- What moved a simulated merchant's clock, so that no command moves it twice.
CREATE TABLE clock_advances (
    command bytea PRIMARY KEY,
    seconds bigint NOT NULL CHECK (seconds > 0),
    clock_offset interval NOT NULL,
    advanced_at timestamptz NOT NULL
);

-- The subject of a role may be a user: it is kept as an account id, like everybody.
CREATE TABLE user_roles (
    account_id bigint PRIMARY KEY,
    role text NOT NULL,
    assigned_at timestamptz NOT NULL
);

-- Catalogue

CREATE TABLE products (
    product_code text PRIMARY KEY,
    title text NOT NULL,
    credits bigint NOT NULL CHECK (credits > 0),
    access_period_days integer NOT NULL CHECK (access_period_days > 0),
    distribution text NOT NULL CHECK (distribution IN ('sellable', 'grant')),
    grant_policy text CHECK (grant_policy IN ('apply_on_signup', 'manual_grant')),
    effective_at timestamptz NOT NULL,
    archived_at timestamptz CHECK (archived_at >= effective_at),
    CONSTRAINT products_grant_policy CHECK ((distribution = 'grant') = (grant_policy IS NOT NULL))
);

CREATE TABLE product_prices (
    product_code text NOT NULL REFERENCES products,
    country text NOT NULL,
    currency text NOT NULL,
    amount numeric NOT NULL CHECK (amount > 0),
    effective_at timestamptz NOT NULL,
    archived_at timestamptz CHECK (archived_at >= effective_at),
    version integer NOT NULL,
    PRIMARY KEY (product_code, country, currency, version),
    CONSTRAINT product_prices_periods EXCLUDE USING gist (
        textrange(product_code, product_code, '[]') WITH &&,
        textrange(country, country, '[]') WITH &&,
        textrange(currency, currency, '[]') WITH &&,
        tstzrange(effective_at, archived_at) WITH &&
    ) DEFERRABLE INITIALLY DEFERRED
);

CREATE TABLE operation_types (
    operation_code text NOT NULL,
    display_name text NOT NULL,
    resource_unit text NOT NULL,
    credits_per_unit numeric NOT NULL CHECK (credits_per_unit > 0),
    minimum_charge bigint NOT NULL CHECK (minimum_charge >= 0),
    workflow_type text,
    effective_at timestamptz NOT NULL,
    archived_at timestamptz CHECK (archived_at >= effective_at),
    version integer NOT NULL,
    PRIMARY KEY (operation_code, version),
    CONSTRAINT operation_types_periods EXCLUDE USING gist (
        textrange(operation_code, operation_code, '[]') WITH &&,
        tstzrange(effective_at, archived_at) WITH &&
    ) DEFERRABLE INITIALLY DEFERRED
);

-- Ledger. No foreign keys here: the auditor checks what they would, and they cost more than all else.

CREATE TABLE accounts (
    account_id bigint PRIMARY KEY,
    user_id text NOT NULL UNIQUE,
    last_seq bigint NOT NULL,
    balance bigint NOT NULL,
    debt bigint NOT NULL CHECK (debt >= 0),
    head bytea NOT NULL,
    last_entry_at timestamptz,
    created_at timestamptz NOT NULL,
    locked boolean NOT NULL DEFAULT false,
    locked_until timestamptz,
    open_operation text,
    erased_at timestamptz
) WITH (fillfactor = 70);

CREATE TABLE entries (
    account_id bigint NOT NULL,
    user_seq bigint NOT NULL,
    amount bigint NOT NULL CHECK (amount <> 0),
    reason text NOT NULL,
    operation_type text NOT NULL,
    resource_amount numeric NOT NULL,
    resource_unit text NOT NULL,
    operation_id text,
    workflow_id text,
    note text,
    command bytea NOT NULL,
    created_at timestamptz NOT NULL,
    effective_at timestamptz NOT NULL,
    balance_after bigint NOT NULL,
    debt_after bigint NOT NULL,
    hash bytea NOT NULL,
    PRIMARY KEY (account_id, user_seq, created_at)
) PARTITION BY RANGE (created_at);
CREATE TABLE entries_default PARTITION OF entries DEFAULT;

CREATE TABLE allocations (
    account_id bigint NOT NULL,
    entry_seq bigint NOT NULL,
    lot_seq bigint NOT NULL,
    at_seq bigint NOT NULL,
    credits bigint NOT NULL CHECK (credits > 0),
    created_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, entry_seq, lot_seq, at_seq, created_at)
) PARTITION BY RANGE (created_at);
CREATE TABLE allocations_default PARTITION OF allocations DEFAULT;

CREATE TABLE lots (
    account_id bigint NOT NULL,
    user_seq bigint NOT NULL,
    credits bigint NOT NULL CHECK (credits > 0),
    remaining bigint NOT NULL CHECK (remaining >= 0 AND remaining <= credits),
    reason text NOT NULL,
    product_code text,
    purchase text,
    issued_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    spent boolean NOT NULL,
    expired_credits bigint NOT NULL DEFAULT 0,
    expiry_seq bigint,
    PRIMARY KEY (account_id, user_seq)
) WITH (fillfactor = 80);
-- Neither key nor predicate holds a column that every debit updates: such updates stay heap-only.
CREATE INDEX lots_unspent ON lots (account_id, user_seq) WHERE NOT spent;
CREATE INDEX lots_due ON lots (account_id, expires_at) WHERE NOT spent;
CREATE INDEX lots_expires_at ON lots (expires_at);

CREATE TABLE debts (
    account_id bigint NOT NULL,
    entry_seq bigint NOT NULL,
    uncovered bigint NOT NULL CHECK (uncovered > 0),
    PRIMARY KEY (account_id, entry_seq)
);

CREATE TABLE operations (
    operation_id text PRIMARY KEY,
    account_id bigint NOT NULL,
    operation_code text NOT NULL,
    resource_unit text NOT NULL,
    credits_per_unit numeric NOT NULL,
    minimum_charge bigint NOT NULL,
    type_effective_at timestamptz,
    workflow_id text,
    state text NOT NULL CHECK (state IN ('open', 'closed', 'cancelled', 'timed_out', 'refused')),
    opened_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    closed_at timestamptz,
    completed_at timestamptz,
    resource_amount numeric,
    credits bigint,
    entry_seq bigint,
    note text
) WITH (fillfactor = 75);
CREATE INDEX operations_expires_at ON operations (expires_at);
CREATE INDEX operations_opened_at ON operations (opened_at, operation_id);
CREATE INDEX operations_account ON operations (account_id, opened_at, operation_id);

CREATE TABLE purchases (
    external_ref text PRIMARY KEY,
    account_id bigint NOT NULL,
    lot_seq bigint NOT NULL,
    credits bigint NOT NULL,
    product_code text NOT NULL,
    payment_method text NOT NULL,
    country text NOT NULL,
    amount numeric NOT NULL CHECK (amount > 0),
    currency text NOT NULL,
    order_placed_at timestamptz NOT NULL,
    settled_at timestamptz NOT NULL,
    applied_at timestamptz NOT NULL,
    command bytea NOT NULL,
    receipt_number text NOT NULL
);

CREATE INDEX purchases_account ON purchases (account_id);
CREATE INDEX purchases_applied_at ON purchases (applied_at, external_ref);

CREATE TABLE purchase_refusals (
    command bytea PRIMARY KEY,
    external_ref text,
    code text NOT NULL,
    message text NOT NULL,
    refused_at timestamptz NOT NULL
);

CREATE INDEX purchase_refusals_purchase ON purchase_refusals (external_ref);

CREATE TABLE reversals (
    kind text NOT NULL CHECK (kind IN ('refund', 'chargeback')),
    key text NOT NULL,
    external_ref text NOT NULL,
    account_id bigint NOT NULL,
    amount numeric NOT NULL CHECK (amount > 0),
    due bigint NOT NULL CHECK (due >= 0),
    taken bigint NOT NULL CHECK (taken BETWEEN 0 AND due),
    entry_seq bigint,
    category text,
    applied_at timestamptz NOT NULL,
    command bytea NOT NULL,
    has_credit_note boolean NOT NULL,
    credit_note_number text,
    won_at timestamptz,
    given_back_seq bigint,
    correction_number text,
    PRIMARY KEY (kind, key)
);
CREATE INDEX reversals_purchase ON reversals (external_ref);

-- Documents

CREATE TABLE document_series (
    prefix text PRIMARY KEY,
    year integer NOT NULL,
    next_number bigint NOT NULL,
    last_issued_at timestamptz NOT NULL,
    head bytea NOT NULL
);

CREATE TABLE documents (
    number text PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('receipt', 'credit_note', 'correction')),
    prefix text NOT NULL,
    year integer NOT NULL,
    sequence bigint NOT NULL,
    issued_at timestamptz NOT NULL,
    external_ref text NOT NULL,
    account_id bigint NOT NULL,
    body text NOT NULL,
    hash bytea NOT NULL,
    command bytea NOT NULL,
    UNIQUE (prefix, year, sequence)
);
CREATE INDEX documents_command ON documents (command);
CREATE INDEX documents_purchase ON documents (external_ref);
CREATE INDEX documents_account ON documents (account_id, issued_at);
CREATE UNIQUE INDEX documents_one_receipt ON documents (external_ref) WHERE kind = 'receipt';

CREATE TABLE buyers (
    number text PRIMARY KEY,
    account_id bigint NOT NULL,
    salt bytea NOT NULL,
    block text NOT NULL
);
CREATE INDEX buyers_account ON buyers (account_id);

CREATE TABLE fiscal_receipts (
    receipt_number text NOT NULL,
    kind text NOT NULL,
    fiscal_number text NOT NULL,
    authority text NOT NULL,
    register_number text,
    qr_url text,
    fiscal_at timestamptz NOT NULL,
    actor text NOT NULL,
    command bytea NOT NULL,
    attached_at timestamptz NOT NULL,
    PRIMARY KEY (receipt_number, kind, fiscal_number)
);

-- Delivery

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
-- For the export of a user: what neither an entry nor an operation tells of. Hardly any command is in it.
CREATE INDEX inbox_account ON inbox (account_id)
    WHERE outcome <> 'applied' OR type NOT IN ('Operation.Open', 'Operation.RecordAndClose', 'Purchase.Settled');

CREATE TABLE parked (
    identity bytea PRIMARY KEY,
    dependency_kind text NOT NULL,
    dependency_key text NOT NULL,
    account_id bigint,
    arrived bigint GENERATED ALWAYS AS IDENTITY,
    parked_at timestamptz NOT NULL,
    due_at timestamptz NOT NULL,
    record_time timestamptz NOT NULL,
    source text NOT NULL,
    id text NOT NULL,
    type text NOT NULL,
    payload text NOT NULL,
    reply_to text,
    traceparent text,
    waiting integer NOT NULL
);
CREATE INDEX parked_dependency ON parked (dependency_kind, dependency_key);
CREATE INDEX parked_due ON parked (due_at);
CREATE INDEX parked_account ON parked (account_id);

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
) WITH (fillfactor = 50);

CREATE TABLE job_state (
    job text PRIMARY KEY,
    watermark timestamptz NOT NULL
);

-- What is written once is never changed, whoever asks.

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE TRIGGER entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER entries_default_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries_default
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER allocations_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON allocations
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER allocations_default_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON allocations_default
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER documents_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON documents
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER fiscal_receipts_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON fiscal_receipts
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER merchant_config_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON merchant_config
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Partitions are made ahead of time by this function alone, so that the worker's role need not own tables.

CREATE FUNCTION ensure_month(month date) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
DECLARE
    first date := date_trunc('month', month);
    next date := first + interval '1 month';
    kind text;
    name text;
    made boolean := false;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('ensure_month'));
    FOREACH kind IN ARRAY ARRAY['entries', 'allocations'] LOOP
        name := format('%s_%s', kind, to_char(first, 'YYYY_MM'));
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        BEGIN
            EXECUTE format(
                'CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)',
                name, kind, first::timestamp AT TIME ZONE 'UTC', next::timestamp AT TIME ZONE 'UTC');
            EXECUTE format(
                'CREATE TRIGGER %I BEFORE UPDATE OR DELETE OR TRUNCATE ON %I FOR EACH STATEMENT '
                'EXECUTE FUNCTION refuse_change()', name || '_append_only', name);
            made := true;
        EXCEPTION WHEN check_violation THEN
            NULL;  -- The default partition holds rows of this month already, and goes on holding them.
        END;
    END LOOP;
    RETURN made;
END $$;

-- Grants

REVOKE ALL ON SCHEMA public FROM PUBLIC;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO credits_worker;
GRANT EXECUTE ON FUNCTION ensure_month(date) TO credits_worker;
GRANT USAGE ON TYPE textrange TO credits_worker;
GRANT EXECUTE ON FUNCTION textrange(text, text), textrange(text, text, text) TO credits_worker;

GRANT SELECT ON ALL TABLES IN SCHEMA public TO credits_worker;
GRANT INSERT ON
    merchant_config, user_roles, products, product_prices, operation_types, accounts, entries, allocations, lots, debts,
    operations, purchases, purchase_refusals, reversals, document_series, documents, buyers, fiscal_receipts, inbox,
    parked, dead_letters, positions, job_state, clock_advances
    TO credits_worker;
GRANT UPDATE ON merchant_state, positions, document_series, job_state TO credits_worker;
GRANT UPDATE (role, assigned_at) ON user_roles TO credits_worker;
GRANT UPDATE (archived_at) ON products, product_prices, operation_types TO credits_worker;
GRANT UPDATE (user_id, last_seq, balance, debt, head, last_entry_at, locked, locked_until, open_operation, erased_at)
    ON accounts TO credits_worker;
GRANT UPDATE (remaining, spent, expired_credits, expiry_seq) ON lots TO credits_worker;
GRANT UPDATE (uncovered) ON debts TO credits_worker;
GRANT UPDATE (workflow_id, state, closed_at, completed_at, resource_amount, credits, entry_seq, note)
    ON operations TO credits_worker;
GRANT UPDATE (won_at, given_back_seq, correction_number) ON reversals TO credits_worker;
GRANT UPDATE (business_key, account_id, outcome, code, decided_at, result, released) ON inbox TO credits_worker;
GRANT UPDATE (waiting) ON parked TO credits_worker;
GRANT UPDATE (redriven_at) ON dead_letters TO credits_worker;
GRANT DELETE ON user_roles, debts, buyers, parked TO credits_worker;
