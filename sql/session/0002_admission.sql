-- What counts a user's sessions one after the other: a row that is locked until the commit. Any role of the database may
-- take an advisory lock, and would hold up POST /sessions by it; these rows only the owner of the tables may lock.
--
-- code of the version before: goes on


CREATE TABLE session_admission (
    slot integer PRIMARY KEY
);
ALTER TABLE session_admission ENABLE ROW LEVEL SECURITY;
INSERT INTO session_admission (slot) SELECT n FROM generate_series(0, 1023) AS n;
