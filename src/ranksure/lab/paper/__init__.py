"""The experiments of Jang, Lee and Ryu (ICML 2024), one per file, each with a ``CLAIM``: ``ranksure reproduce``."""
