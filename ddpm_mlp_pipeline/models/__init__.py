"""ε-networks. Each file is self-contained, because a checkpoint carries it."""
