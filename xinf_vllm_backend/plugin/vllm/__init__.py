"""Named after the engine: that is how Xinference tells what a class serves (Anthropic's features depend on it)."""
