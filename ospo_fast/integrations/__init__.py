"""Adapters for other libraries: the loss for TRL, verl, transformers, Lightning and Accelerate, attention for kvpress.

Each module needs the library of its name, `attention` that of transformers, and is imported by its users only. Nothing
is patched at import.
"""
