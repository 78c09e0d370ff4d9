"""LoRA fine-tuning of a vision-language model into a photography advisor, on MLX.

One experiment is one composed config; ``python -m mondrian_ft`` runs it. Everything else is plain
Python that takes values, so it can be used from a notebook as well.
"""

__version__ = "0.1.0"
