"""Schema migrations: the lineages ``control`` (one database) and ``merchant`` (a database each)."""
