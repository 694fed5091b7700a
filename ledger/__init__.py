"""Accounts, lots, entries, allocations and operations: the heart of the service."""
