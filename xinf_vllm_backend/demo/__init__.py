"""A real cluster with a tiny model, for ``xinf-vllm demo`` and for the tests.

Importing this package imports nothing else; take what you need from its modules.
"""
