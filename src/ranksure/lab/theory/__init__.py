"""Results of the literature, one per file, each with a ``CLAIM``: ``ranksure lab``."""
