"""Receipts, credit notes and corrections: documents, tax and numbering."""
