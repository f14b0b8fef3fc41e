"""Audio, protocols, the small corpus and the loaders."""
