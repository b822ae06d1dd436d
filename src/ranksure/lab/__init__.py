"""Claims measured: results of the literature (``theory/``) and the paper's experiments (``paper/``), in one frame.

``claim`` says what a claim and a finding are, ``run`` finds, measures and writes them, ``figures`` draws them;
``settings/`` has what experiments run on and ``landscape/`` the census of random starts. What the claims are about (the
theorems as functions, the solvers) lives above, in ``theory/`` and ``solvers/``.
"""
