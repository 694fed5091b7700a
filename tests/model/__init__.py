"""A reference model of one merchant's ledger: small, slow and plain, written from the domain's rules alone.

It shares nothing with the product, so that the two can be compared: commands in as on the wire, results out.
"""
