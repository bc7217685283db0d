"""The stages of OSPO: each a function from records to records."""
