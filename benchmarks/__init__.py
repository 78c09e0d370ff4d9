"""What this project costs beside others, and what its own choices are worth.

``python -m benchmarks`` measures everything; ``python -m benchmarks training_step`` one entry.
Figures go to ``results/<machine>.json``, conclusions to ``LOG.md``.
"""
