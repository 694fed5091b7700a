"""Merchants: their registry, configuration, roles and databases, each isolated from the others."""
