"""The YAML files Hydra composes; a package so that an installed wheel finds them."""
