"""How engine processes are made, bound and killed. Knows neither vLLM nor Xinference."""
