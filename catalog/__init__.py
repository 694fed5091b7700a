"""Products, prices and operation types: what a merchant sells and what an operation costs."""
