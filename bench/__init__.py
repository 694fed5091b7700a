"""Measures the service on a real broker, a real PostgreSQL and real worker processes; run it as ``python -m bench``."""
