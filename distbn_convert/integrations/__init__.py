"""Pairs and hooks for other packages; each file is imported only if the user has that package."""
