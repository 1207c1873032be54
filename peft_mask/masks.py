class Masks(dict):  # placeholder, being written
    pass
