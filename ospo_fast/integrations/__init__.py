"""Adapters of the loss for other trainers: TRL, verl, transformers, Lightning and Accelerate.

Each module needs the library of its name and is imported by its users only. Nothing is patched at import.
"""
