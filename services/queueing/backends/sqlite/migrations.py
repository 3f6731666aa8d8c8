"""The schema, as the steps that lead to it; a file is brought from wherever it is to the last one.

A step that has been released is never changed: another is added.
"""

_FIRST = """
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, created REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS subscriptions (
    name TEXT PRIMARY KEY, topic TEXT NOT NULL, ack_deadline_s REAL NOT NULL, backoff TEXT NOT NULL,
    minimum_s REAL NOT NULL, maximum_s REAL NOT NULL, max_attempts INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS subscriptions_by_topic ON subscriptions (topic);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL, topic TEXT NOT NULL, data BLOB NOT NULL,
    attributes TEXT NOT NULL, published REAL NOT NULL, holders INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS deliveries (
    subscription TEXT NOT NULL, message INTEGER NOT NULL, due REAL NOT NULL, size INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, lease TEXT, history TEXT NOT NULL DEFAULT '[]',
    PRIMARY KEY (subscription, message)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deliveries_by_due ON deliveries (subscription, due, message);
CREATE INDEX IF NOT EXISTS deliveries_by_lease ON deliveries (lease) WHERE lease IS NOT NULL;
CREATE TABLE IF NOT EXISTS dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, subscription TEXT NOT NULL, message_id TEXT NOT NULL,
    topic TEXT NOT NULL, data BLOB NOT NULL, attributes TEXT NOT NULL, published REAL NOT NULL,
    died REAL NOT NULL, reason TEXT NOT NULL, history TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS dead_letters_by_subscription ON dead_letters (subscription, id);
CREATE TABLE IF NOT EXISTS dedup (
    topic TEXT NOT NULL, dedup_id TEXT NOT NULL, message_id TEXT NOT NULL, seen REAL NOT NULL,
    PRIMARY KEY (topic, dedup_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS dedup_by_age ON dedup (seen);
"""

_ORDER_PRIORITY_LOG = """
ALTER TABLE topics ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
ALTER TABLE subscriptions ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
ALTER TABLE messages ADD COLUMN ordering_key TEXT NOT NULL DEFAULT '';
ALTER TABLE messages ADD COLUMN priority INTEGER NOT NULL DEFAULT 1;
ALTER TABLE messages ADD COLUMN correlation_id TEXT NOT NULL DEFAULT '';
ALTER TABLE messages ADD COLUMN retry TEXT;
ALTER TABLE dead_letters ADD COLUMN ordering_key TEXT NOT NULL DEFAULT '';
ALTER TABLE dead_letters ADD COLUMN priority INTEGER NOT NULL DEFAULT 1;
ALTER TABLE dead_letters ADD COLUMN correlation_id TEXT NOT NULL DEFAULT '';
ALTER TABLE dead_letters ADD COLUMN retry TEXT;
ALTER TABLE dead_letters ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
UPDATE dead_letters SET attempts = json_array_length(history);
ALTER TABLE deliveries ADD COLUMN priority INTEGER NOT NULL DEFAULT 1;
ALTER TABLE deliveries ADD COLUMN ordering_key TEXT NOT NULL DEFAULT '';
ALTER TABLE deliveries ADD COLUMN not_before REAL NOT NULL DEFAULT 0;
ALTER TABLE deliveries ADD COLUMN expires REAL;
DROP INDEX deliveries_by_due;
CREATE INDEX deliveries_by_due ON deliveries (subscription, priority, due, message);
CREATE INDEX deliveries_by_key ON deliveries (subscription, ordering_key, message) WHERE ordering_key != '';
CREATE INDEX deliveries_by_expiry ON deliveries (subscription, expires) WHERE expires IS NOT NULL;
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL, topic TEXT NOT NULL,
    data BLOB NOT NULL, attributes TEXT NOT NULL, published REAL NOT NULL, ordering_key TEXT NOT NULL,
    priority INTEGER NOT NULL, correlation_id TEXT NOT NULL, retry TEXT, kind TEXT NOT NULL
);
CREATE INDEX events_by_topic ON events (topic, sequence);
CREATE INDEX events_by_kind ON events (topic, kind, sequence) WHERE kind != '';
CREATE INDEX events_by_correlation ON events (topic, correlation_id, sequence) WHERE correlation_id != '';
CREATE INDEX events_by_key ON events (topic, ordering_key, sequence) WHERE ordering_key != '';
"""

_DEFERRED = """
CREATE TABLE deferred (
    id INTEGER PRIMARY KEY AUTOINCREMENT, subscription TEXT NOT NULL, due REAL NOT NULL, expires REAL,
    attempts INTEGER NOT NULL, history TEXT NOT NULL, copy TEXT NOT NULL, message_id TEXT NOT NULL,
    topic TEXT NOT NULL, data BLOB NOT NULL, attributes TEXT NOT NULL, published REAL NOT NULL,
    ordering_key TEXT NOT NULL, priority INTEGER NOT NULL, correlation_id TEXT NOT NULL, retry TEXT
);
CREATE INDEX deferred_by_due ON deferred (due, id);
CREATE INDEX deferred_by_subscription ON deferred (subscription, message_id);
"""

_SNAPSHOTS = """
CREATE TABLE snapshots (
    name TEXT PRIMARY KEY, topic TEXT NOT NULL, filter TEXT NOT NULL, expires REAL NOT NULL,
    labels TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX snapshots_by_topic ON snapshots (topic, name);
"""

_SHARES = """
CREATE TABLE shares (message INTEGER PRIMARY KEY, holders INTEGER NOT NULL);
INSERT INTO shares SELECT id, holders FROM messages WHERE holders > 1;
"""
"""A message without a row here has one holder. `messages.holders` says nothing any more: to count there was
to write the content again.
"""
MIGRATIONS = (_FIRST, _ORDER_PRIORITY_LOG, _DEFERRED, _SNAPSHOTS, _SHARES)
