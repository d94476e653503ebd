"""Files as they are met on disk: what kind each is, JSON, paths that stay inside, atomic writes, locks."""
