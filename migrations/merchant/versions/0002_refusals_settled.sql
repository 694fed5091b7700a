-- An order that will never be applied, as its money was paid back, needs nobody any more.
ALTER TABLE purchase_refusals ADD COLUMN settled_at timestamptz;

GRANT UPDATE (settled_at) ON purchase_refusals TO credits_worker;
