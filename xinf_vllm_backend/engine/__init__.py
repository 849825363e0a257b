"""vLLM engines. Knows no Xinference; nothing below this package knows vLLM."""
