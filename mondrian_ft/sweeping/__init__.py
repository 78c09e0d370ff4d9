"""Many runs of one recipe: a grid of values, or a search, each job as if it ran alone.

Hydra composes the jobs and a launcher of Hydra's runs them; what a job became is read from its
folder, so it does not matter in which process, or on which machine, it ran.
"""
