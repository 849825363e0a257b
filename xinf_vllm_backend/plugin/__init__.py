"""The Xinference side. Nothing below this package knows Xinference."""
