"""Tables as training data: reading files, deciding on columns, preparing them."""
