"""Model files: one module a format, each reading and writing from one map of names."""
