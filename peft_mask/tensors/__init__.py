"""A weight as it is stored: its elements, its shards, its codes, and random numbers that follow from it."""
