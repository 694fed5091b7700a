-- They are written in the order of that time, so that a few pages of ranges do what an index of every row would.

CREATE INDEX documents_issued ON documents USING brin (issued_at);
