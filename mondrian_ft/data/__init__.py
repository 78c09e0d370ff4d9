"""From a job database and a folder of photographs to locked training rows.

``store`` reads SQLite, ``critique`` is the one schema of an analysis, ``parsers`` read it from
every stored shape, ``prompt`` builds the one prompt, ``link`` joins rows, photographs and analyses
into a manifest, ``split`` deals photographs to parts, ``dataset`` writes and reads the training
files. Nothing here imports MLX or Hydra.
"""
