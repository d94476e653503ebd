"""Files on disk: their kinds, strict JSON, paths that stay inside a directory, atomic writes, locks."""
