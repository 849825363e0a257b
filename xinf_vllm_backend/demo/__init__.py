"""A real cluster with a tiny model, for ``xinf-vllm demo`` and for the tests.

Importing this package imports nothing else; take what you need from its modules.
"""

# Environment in which no model hub is asked and no usage is reported.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
